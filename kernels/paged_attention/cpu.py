"""Decode attention over packed pages on a CPU: nothing is decoded but into registers.

Compiled for the processor it runs on, once a format and group size (`cpu_compile`), and run by
threads over sequences, heads and splits of long contexts: one call of compiled code a layer.

Shape suffixes: B sequences, H key/value heads, G queries of each, N pages, Y bytes of a page, S
splits, C coded channels of a key, V of a value, D head size, R tokens in 16 bits.
"""

import ctypes
import struct
from collections.abc import Sequence
from functools import cache
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from stillhouse.kernels.paged_attention.cpu_compile import Compiled, compiled, processor
from stillhouse.kernels.paged_attention.cpu_spec import (
    JOB_WORDS,
    DecodeSpec,
    split_count,
    value_lanes,
)
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
_RAW_PARTS = 2


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
    each part, float16 or bfloat16, contiguous over D. ranges: of each sequence the tokens
    [first, last) of both parts, one behind the other. mean_HD: float32, the packed values' mean.
    """

    query_BHGD: Tensor
    parts: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
    ranges: Sequence[tuple[int, int, int, int]]
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
        ranges: Sequence[tuple[int, int]],
        table_BW: Tensor | None = None,
        offset_BHG: Tensor | None = None,
        threads: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Softmax sums over the packed tokens [first, last) of each sequence.

        query_BHGC: float32, in the keys' coded basis, times the softmax scale. table_BW: int32, the
        page of each `pages.tokens` tokens of a sequence, anything where no range is; None for
        records. offset_BHG: float32, added to every score, as a query's product with the keys'
        mean. threads: torch's number by default; the result's bits do not depend on it.

        Returns float32 m [B, H, G], the greatest score (-1e30 · ln 2 for an empty range),
        l = Σ exp(s - m) [B, H, G] and Σ exp(s - m) · value [B, H, G, V]: divide by l, or merge with
        other tokens' sums first. ValueError for shapes, dtypes, pages and ranges that do not fit.
        """
        inputs = Inputs(query_BHGC, (keys, values), ranges, table_BW, offset_BHG)
        require(self._key, self._value, self.pages.tokens, self.group, inputs)
        require_least("threads", threads, 1)
        offset = None if offset_BHG is None else offset_BHG.float() * LOG2E
        spans = [(*span, 0, 0, 0, 0) for span in ranges]
        words, kept = self._packed(inputs._replace(query=query_BHGC * LOG2E, offset=offset), spans)
        batch, heads, group, _ = query_BHGC.shape
        top, total = (_floats(batch, heads, group) for _ in range(2))
        out = _floats(batch, heads, group, self._value.channels)
        words.update(top=top.data_ptr(), total=total.data_ptr(), out=out.data_ptr())
        self._run(self._code(0), words, (kept, top, total, out), threads)
        return top, total, out

    def attend_with(
        self,
        query_BHGC: Tensor,
        keys: PackedHalf,
        values: PackedHalf,
        ranges: Sequence[tuple[int, int]],
        raw: RawTokens,
        table_BW: Tensor | None = None,
        offset_BHG: Tensor | None = None,
        threads: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The softmax over packed tokens and those in 16 bits, in both parts.

        As `attend`, but query_BHGC and offset_BHG are times log2 e, too. Returns the shares of the
        packed values in their coded basis, float32 [B, H, G, V], and those of the raw values and of
        the packed ones' mean, [B, H, G, D]: the result is the sum of both in one basis, and zeros
        where a sequence sees no token. ValueError as `attend`, and for a head size below 16.
        """
        inputs = Inputs(query_BHGC, (keys, values), ranges, table_BW, offset_BHG)
        require(self._key, self._value, self.pages.tokens, self.group, inputs)
        require_raw(raw, query_BHGC.shape)
        require_least("threads", threads, 1)
        spans = [(*one, *two) for one, two in zip(ranges, raw.ranges, strict=True)]
        words, kept = self._packed(inputs, spans)
        batch, heads, group, _ = query_BHGC.shape
        dim = raw.query_BHGD.shape[-1]
        out = _floats(batch, heads, group, self._value.channels)
        raw_out = _floats(batch, heads, group, dim)
        query = raw.query_BHGD.contiguous()
        row = 16 + sum(keys.shape[2] for keys, _ in raw.parts)  # room for a vector past the last
        scores = _floats(batch * heads * row)
        mean = None if raw.mean_HD is None else raw.mean_HD.contiguous()
        words.update(
            out=out.data_ptr(),
            raw_query=query.data_ptr(),
            raw_mean=0 if mean is None else mean.data_ptr(),
            raw_out=raw_out.data_ptr(),
            scores=scores.data_ptr(),
            scores_row=row,
        )
        for number, part in enumerate(raw.parts):
            for name, tensor in zip(("key", "value"), part, strict=True):
                words[f"raw{number}_{name}s"] = tensor.data_ptr()
                for axis, stride in zip(("row", "head", "token"), tensor.stride(), strict=False):
                    words[f"raw{number}_{name}_{axis}"] = 2 * stride
        brain_key, brain_value = (part.dtype == torch.bfloat16 for part in raw.parts[0])
        code = self._code(dim, (brain_key, brain_value))
        self._run(code, words, (kept, raw, query, mean, scores, out, raw_out), threads)
        return out, raw_out

    def _code(self, raw: int, brain: tuple[bool, bool] = (False, False)) -> Compiled:
        found = self._codes.get((raw, brain))
        if found is None:
            capped = bool(self._softcap)
            spec = DecodeSpec(self.pages, self.group, capped, self._permute, raw, brain)
            found = self._codes[raw, brain] = compiled(spec)
        return found

    def _packed(
        self, inputs: Inputs, spans: Sequence[tuple[int, ...]]
    ) -> tuple[dict[str, int], object]:
        """The job's words for packed tokens, and what they point to."""
        query, halves, ranges, table, offset = inputs
        batch, heads, group, _ = query.shape
        splits = max([1, *(split_count(*span) for span in ranges)])
        # ctypes' arrays are made faster than tensors, and one tensor faster than two.
        flat = [end for span in spans for end in span]
        spans_B6 = (ctypes.c_int64 * len(flat))(*flat)
        done = (ctypes.c_int64 * (batch * heads))()
        rows = batch * heads * splits * group
        sums = _floats(rows * (self._width + 2))
        query = query.contiguous()
        none = (ctypes.c_float * (batch * heads * group))()  # offsets where there are none
        offset = None if offset is None else offset.contiguous()
        words = {
            "done": ctypes.addressof(done), "heads": heads, "items": batch * heads * splits,
            "splits": splits, "softcap": self._cap, "spans": ctypes.addressof(spans_B6),
            "query": query.data_ptr(),
            "offset": ctypes.addressof(none) if offset is None else offset.data_ptr(),
            "books": self._books.data_ptr(),
            "acc": sums.data_ptr(), "ml": sums.data_ptr() + 4 * rows * self._width,
        }  # fmt: skip
        if table is not None:
            words.update(table=table.data_ptr(), table_row=4 * table.stride(0))
        words.update(half_places(self._key, halves[0]))
        words.update(half_places(self._value, halves[1]))
        return words, (halves, table, spans_B6, done, sums, query, offset, none)

    def _run(
        self, code: Compiled, words: dict[str, int], kept: object, threads: int | None
    ) -> None:
        words["threads"] = threads = min(threads or torch.get_num_threads(), words["items"])
        job = _Job(*map(words.get, JOB_WORDS, repeat(0)))
        run_together(code, ctypes.addressof(job), threads, (self._books, kept, job))


def _floats(*shape: int) -> Tensor:
    # An explicit dtype: a serving engine runs models under a bfloat16 default dtype.
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def half_places(half: HalfShape, packed: PackedHalf) -> dict[str, int]:
    """Addresses of vectors and scalars, bytes from sequence to sequence, head to head, page to
    page."""
    vectors, scalars = packed.vectors, packed.scalars
    start = vectors.data_ptr()
    if half.paged:
        page, head, _ = vectors.stride()
        found = (start, start + half.scalars, 0, 0, head, head, page)
    elif scalars is None:
        row, head = vectors.stride()[:2]
        found = (start, start, row, row, head, head, 0)
    else:
        row, head = vectors.stride()[:2]
        scalar_row, scalar_head = (2 * n for n in scalars.stride()[:2])
        found = (start, scalars.data_ptr(), row, scalar_row, head, scalar_head, 0)
    return dict(zip(_WORDS[half.name], found, strict=True))


_WORDS = {
    f"{name}s": tuple(word for word in JOB_WORDS if word.startswith(f"{name}_"))
    for name in ("key", "value")
}


@cache
def decoder(pages: PageFormat | RecordFormat, group: int, softcap: float = 0.0) -> PackedDecoder:
    """One for each format; compiles at the first call."""
    return PackedDecoder(pages, group, softcap)
