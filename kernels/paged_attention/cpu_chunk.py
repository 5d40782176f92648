"""Continued prefill on a CPU: a chunk of queries over packed history and its own raw tokens.

History is decoded a tile at a time into a buffer of at most 32 kB (`cpu_chunk_ir`); nothing of the
cache is kept decoded. Causal, with sliding windows that each query has its own of.

Shape suffixes: B sequences, H key/value heads, G queries of each, T tokens of the chunk, Q query
heads, M rows, row t·G + g of token t; R raw tokens, C coded channels of a key, V of a value, D head
size.
"""

import ctypes
import struct
from collections.abc import Sequence
from functools import cache
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from stillhouse.kernels.paged_attention.cpu import PackedHalf, code_books, half_places
from stillhouse.kernels.paged_attention.cpu_chunk_rows import (
    BLOCK_ROWS,
    CHUNK_WORDS,
    RAW_STEP,
    ChunkSpec,
)
from stillhouse.kernels.paged_attention.cpu_compile import compiled, processor
from stillhouse.kernels.paged_attention.cpu_multiply import ROWS
from stillhouse.kernels.paged_attention.cpu_spec import (
    KEY_WORDS,
    VALUE_WORDS,
    filled_lanes,
    value_lanes,
)
from stillhouse.kernels.paged_attention.cpu_threads import run_together
from stillhouse.kernels.paged_attention.pages import PageFormat, RecordFormat
from stillhouse.kernels.paged_attention.refusals import (
    HalfShape,
    Inputs,
    places_of,
    require,
    require_chunk,
    require_least,
)
from stillhouse.kernels.paged_attention.units import LOG2E

_Job = ctypes.c_int64 * len(CHUNK_WORDS)


class ChunkSpan(NamedTuple):
    """A sequence's history tokens [first, last), and where its chunk stands.

    position: the place that the chunk's first token has among the history's, `last` or later where
    raw tokens lie between. hidden: raw tokens, from the first, that no query sees.
    """

    first: int
    last: int
    position: int
    hidden: int = 0


class ChunkTokens(NamedTuple):
    """The chunk in the model's basis, float32; R tokens, the last T of them the chunk's.

    query_BHMD: times the softmax scale. R > T where tokens in 16 bits lie between.
    """

    query_BHMD: Tensor
    key_BHRD: Tensor
    value_BHRD: Tensor


class ChunkDecoder:
    """Attends with chunks over packed keys and values of one format; see `chunk_decoder`.

    group: G. softcap: of scores, 0 for none.
    """

    def __init__(self, pages: PageFormat | RecordFormat, group: int, softcap: float = 0.0) -> None:
        self.pages, self.group, self._capped = pages, group, bool(softcap)
        [self._cap] = struct.unpack("<i", struct.pack("<f", softcap * LOG2E))
        self._books = code_books(pages)
        self._key = HalfShape.of("keys", pages.key)
        self._value = HalfShape.of("values", pages.value)

    def attend(
        self,
        query_BHMC: Tensor,
        keys: PackedHalf,
        values: PackedHalf,
        spans: Sequence[ChunkSpan],
        chunk: ChunkTokens,
        *,
        table_BW: Tensor | None = None,
        offset_BHM: Tensor | None = None,
        window: int = 0,
        threads: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The softmax over history and raw tokens, of each query up to its own token.

        query_BHMC: float32, in the keys' coded basis, times the softmax scale. table_BW: as
        `cpu_plan.DecodePlan`. offset_BHM: added to packed scores, as a query's product with the
        keys' mean. window: how many tokens a query sees, itself included; 0 for all. threads:
        torch's number by default; the result's bits do not depend on it.

        Returns the shares of the packed values in their coded basis, float32 [B, H, M, V], those
        of the raw values, [B, H, M, D], and the packed tokens' share of the probability, [B, H, M],
        which the packed values' mean is to be multiplied by. ValueError for what does not fit.
        """
        ranges = [(span.first, span.last) for span in spans]
        inputs = Inputs(query_BHMC, (keys, values), offset_BHM)
        batch, heads, rows = query_BHMC.shape[:3]
        require(self._key, self._value, rows, inputs)
        places = places_of(ranges, self.pages.tokens, table_BW)
        places.require_within((keys, values))
        require_chunk(chunk, query_BHMC.shape, spans, self.group)
        require_least("threads", threads, 1)
        require_least("a window", window, 0)
        dim, count = chunk.query_BHMD.shape[-1], chunk.key_BHRD.shape[2]
        wide, filled = filled_lanes(dim), -(-rows // ROWS) * ROWS
        most = -(-count // RAW_STEP) * RAW_STEP
        more = filled - rows
        query = pad(query_BHMC * LOG2E, (0, 0, 0, more)).contiguous()
        offset = _zeros(batch, heads, filled)
        if offset_BHM is not None:
            offset[:, :, :rows] = offset_BHM * LOG2E
        raw_query = pad(chunk.query_BHMD * LOG2E, (0, wide - dim, 0, more)).contiguous()
        sides = (0, wide - dim, 0, most - count)
        raw_keys = pad(chunk.key_BHRD, sides).mT.contiguous()
        raw_values = pad(chunk.value_BHRD, sides).contiguous()
        lanes = value_lanes(self.pages.value.format)
        out, raw_out = (_zeros(batch, heads, filled, size) for size in (lanes[-1], wide))
        share = _zeros(batch, heads, filled)
        before = count - rows // self.group
        flat = [n for s in spans for n in (s.first, s.last, s.position, before, s.hidden)]
        ends = (ctypes.c_int64 * len(flat))(*flat)
        blocks = -(-filled // BLOCK_ROWS)
        words = {
            "items": batch * heads * blocks, "heads": heads, "blocks": blocks, "rows": filled,
            "softcap": self._cap, "window": window, "spans": ctypes.addressof(ends),
            "books": self._books.data_ptr(), "query": query.data_ptr(),
            "offset": offset.data_ptr(), "raw_query": raw_query.data_ptr(),
            "raw_keys": raw_keys.data_ptr(), "raw_values": raw_values.data_ptr(),
            "raw_tokens": most, "out": out.data_ptr(), "raw_out": raw_out.data_ptr(),
            "share": share.data_ptr(),
            **dict(zip(KEY_WORDS, half_places(self._key, keys), strict=True)),
            **dict(zip(VALUE_WORDS, half_places(self._value, values), strict=True)),
        }  # fmt: skip
        if table_BW is not None:
            words.update(table=table_BW.data_ptr(), table_row=4 * table_BW.stride(0))
        job = _Job(*map(words.get, CHUNK_WORDS, repeat(0)))
        kept = (keys, values, table_BW, query, offset, raw_query, raw_keys, raw_values, ends, out,
                raw_out, share, self._books, job)  # fmt: skip
        code = compiled(ChunkSpec(self.pages, self.group, self._capped, processor().permute, wide))
        threads = min(threads or torch.get_num_threads(), words["items"])
        run_together(code, ctypes.addressof(job), threads, kept)
        return (
            self._without_padding(out[:, :, :rows]),
            raw_out[:, :, :rows, :dim],
            share[:, :, :rows],
        )

    def _without_padding(self, out_BHMV: Tensor) -> Tensor:
        """Without the lanes that pad channel groups."""
        format = self.pages.value.format
        starts = value_lanes(format)
        if starts[-1] == format.channels:
            return out_BHMV
        groups = zip(starts, format.groups, strict=False)
        return torch.cat([out_BHMV[..., at : at + group.channels] for at, group in groups], dim=-1)


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device="cpu")


@cache
def chunk_decoder(
    pages: PageFormat | RecordFormat, group: int, softcap: float = 0.0
) -> ChunkDecoder:
    """One for each format; compiles at the first call."""
    return ChunkDecoder(pages, group, softcap)
