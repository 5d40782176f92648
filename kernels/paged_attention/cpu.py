"""Decode attention over packed pages on a CPU: nothing is decoded but into registers.

Compiled for the processor it runs on, once a format and group size (`cpu_compile`), and run by
threads over sequences, heads and splits of long contexts: one call of compiled code a layer.

Shape suffixes: B sequences, H key/value heads, G queries of each, N pages, Y bytes of a page, C
coded channels of a key, V of a value, D head size, R tokens in 16 bits.
"""

import ctypes
import struct
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from stillhouse.kernels.paged_attention.cpu_compile import Compiled, compiled, processor
from stillhouse.kernels.paged_attention.cpu_lanes import LANES
from stillhouse.kernels.paged_attention.cpu_plan import DecodePlan
from stillhouse.kernels.paged_attention.cpu_spec import JOB_WORDS, DecodeSpec, value_lanes
from stillhouse.kernels.paged_attention.cpu_threads import run_together
from stillhouse.kernels.paged_attention.pages import PageFormat, RecordFormat
from stillhouse.kernels.paged_attention.refusals import (
    HalfShape,
    Inputs,
    require,
    require_least,
    require_raw,
)
from stillhouse.kernels.paged_attention.units import LOG2E as LOG2E  # queries are times it
from stillhouse.kernels.turboquant import gaussian_codebook

_Job = ctypes.c_int64 * len(JOB_WORDS)


def code_books(pages: PageFormat | RecordFormat) -> Tensor:
    """float32 [groups, 32]: centroids of every group of keys, then of values, each repeated."""
    rows = []
    for vectors in (pages.key.format, pages.value.format):
        scale = vectors.channels**-0.5  # decoded vectors are centroids · scalar / √C
        for group in vectors.groups:
            row = torch.zeros(32, dtype=torch.float32, device="cpu")
            if not vectors.is_fp8:
                book = torch.tensor(gaussian_codebook(group.bits).centroids, dtype=torch.float64)
                row = (book * scale).float().repeat(32 // book.numel())
            rows.append(row)
    return torch.stack(rows).contiguous()


class PackedHalf(NamedTuple):
    """Keys or values of a layer: half pages, or a sequence's packed vectors and their scalars.

    Pages: uint8 [N, H, Y] each contiguous in itself, and None. Records: uint8 [B, H, T, P] and
    float16 [B, H, T], contiguous; fp8 has no scalars.
    """

    vectors: Tensor
    scalars: Tensor | None = None


class RawTokens(NamedTuple):
    """Tokens in 16 bits that share the softmax with the packed ones, in two parts.

    query_BHGD: float32, times the softmax scale and log2 e. parts: keys and values [B, H, R, D] of
    each part, float16 or bfloat16, contiguous over D. mean_HD: float32, the packed values' mean.
    """

    query_BHGD: Tensor
    parts: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
    mean_HD: Tensor | None = None


class PackedDecoder:
    """Attends over packed keys and values of one format, in groups of one size; see `decoder`.

    pages: pages or records of both. group: G. softcap: of scores, 0 for none. permute: how tables
    are read (`DecodeSpec`), this processor's best by default.
    """

    def __init__(
        self,
        pages: PageFormat | RecordFormat,
        group: int,
        softcap: float = 0.0,
        permute: str | None = None,
    ) -> None:
        self.pages, self.group, self._softcap = pages, group, softcap
        self._permute = processor().permute if permute is None else permute
        [self._cap] = struct.unpack("<i", struct.pack("<f", softcap * LOG2E))
        self._books = code_books(pages)
        self._key = HalfShape.of("keys", pages.key)
        self._value = HalfShape.of("values", pages.value)
        self._width = value_lanes(pages.value.format)[-1]
        self._codes: dict[tuple[int, tuple[bool, bool]], Compiled] = {}

    def attend(
        self,
        query_BHGC: Tensor,
        keys: PackedHalf,
        values: PackedHalf,
        plan: DecodePlan,
        raw: RawTokens,
        offset_BHG: Tensor | None = None,
        threads: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The softmax over the packed tokens that each sequence sees and those in 16 bits.

        query_BHGC: float32, in the keys' coded basis, times the softmax scale and log2 e.
        offset_BHG: float32, added to every packed score, as a query's product with the keys' mean,
        times the same. threads: torch's number by default; the result's bits do not depend on it.

        Returns the shares of the packed values in their coded basis, float32 [B, H, G, V], and
        those of the raw values and of the packed ones' mean, [B, H, G, D]: the result is the sum of
        both in one basis, and zeros where a sequence sees no token. ValueError for shapes, dtypes,
        pages and ranges that do not fit, and for a head size below 16.
        """
        shape, dim = query_BHGC.shape, raw.query_BHGD.shape[-1]
        require(self._key, self._value, self.group, Inputs(query_BHGC, (keys, values), offset_BHG))
        plan.require(shape, self.pages.tokens)
        plan.places.require_within((keys, values))
        require_raw(raw, shape, plan.raw_ends)
        require_least("threads", threads, 1)
        out, raw_out = _floats(*shape[:3], self._value.channels), _floats(*shape[:3], dim)
        query, raw_query = query_BHGC.contiguous(), raw.query_BHGD.contiguous()
        offset = None if offset_BHG is None else offset_BHG.contiguous()
        mean = None if raw.mean_HD is None else raw.mean_HD.contiguous()
        rows = plan.items * self.group
        scores_row = LANES + sum(part.shape[2] for part, _ in raw.parts)  # a vector past the last
        sums = rows * (self._width + 2)
        room = plan.room(sums + shape[0] * shape[1] * scores_row)
        start = room.data_ptr()
        threads = min(threads or torch.get_num_threads(), plan.items)
        # In the order of `JOB_WORDS`.
        job = _Job(
            0, *plan.words, threads, self._cap, self._books.data_ptr(),
            *half_places(self._key, keys), *half_places(self._value, values),
            query.data_ptr(), plan.no_offset if offset is None else offset.data_ptr(),
            start, start + 4 * rows * self._width, out.data_ptr(),
            *_raw_places(raw.parts), raw_query.data_ptr(), 0 if mean is None else mean.data_ptr(),
            raw_out.data_ptr(), start + 4 * sums, scores_row,
        )  # fmt: skip
        brain_key, brain_value = (part.dtype == torch.bfloat16 for part in raw.parts[0])
        kept = keys, values, plan, raw, query, raw_query, offset, mean, room, out, raw_out, job
        code = self._code(dim, (brain_key, brain_value))
        run_together(code, ctypes.addressof(job), threads, kept)
        return out, raw_out

    def _code(self, dim: int, brain: tuple[bool, bool]) -> Compiled:
        found = self._codes.get((dim, brain))
        if found is None:
            spec = DecodeSpec(
                self.pages, self.group, dim, bool(self._softcap), self._permute, brain
            )
            found = self._codes[dim, brain] = compiled(spec)
        return found


def _floats(*shape: int) -> Tensor:
    # An explicit dtype: a serving engine runs models under a bfloat16 default dtype.
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def half_places(half: HalfShape, packed: PackedHalf) -> tuple[int, ...]:
    """Addresses of vectors and scalars, bytes from sequence to sequence, head to head, page to
    page: `HALF_WORDS`."""
    vectors, scalars = packed.vectors, packed.scalars
    start = vectors.data_ptr()
    if half.paged:
        page, head, _ = vectors.stride()
        return start, start + half.scalars, 0, 0, head, head, page
    row, head = vectors.stride()[:2]
    if scalars is None:
        return start, start, row, row, head, head, 0
    scalar_row, scalar_head, _ = scalars.stride()
    return start, scalars.data_ptr(), row, 2 * scalar_row, head, 2 * scalar_head, 0


def _raw_places(parts: Sequence[tuple[Tensor, Tensor]]) -> Iterator[int]:
    """Of both parts `RAW_WORDS`, in bytes."""
    for part in parts:
        for tensor in part:
            row, head, token, _ = tensor.stride()
            yield from (tensor.data_ptr(), 2 * row, 2 * head, 2 * token)


@cache
def decoder(pages: PageFormat | RecordFormat, group: int, softcap: float = 0.0) -> PackedDecoder:
    """One for each format; compiles at the first call."""
    return PackedDecoder(pages, group, softcap)
