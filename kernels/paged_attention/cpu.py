"""Decode attention over packed pages on a CPU: nothing is decoded but into registers.

Compiled for the processor it runs on, once a format and group size (`cpu_compile`), and run by
threads over sequences, heads and splits of long contexts.

Shape suffixes: B sequences, H key/value heads, G queries of each, N pages, Y bytes of a page, S
splits, C coded channels of a key, V padded channels of a value.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from stillhouse.kernels.paged_attention.cpu_compile import compiled, processor
from stillhouse.kernels.paged_attention.cpu_ir import DecodeSpec, value_lanes
from stillhouse.kernels.paged_attention.pages import (
    HalfPage,
    PageFormat,
    RecordFormat,
    Records,
)
from stillhouse.kernels.paged_attention.refusals import Inputs, require
from stillhouse.kernels.turboquant import gaussian_codebook

_LN2 = 0.6931471805599453
SPLIT_TOKENS = 2048  # a thread's work is one split: small enough to balance, large enough to pay


def _books(pages: PageFormat | RecordFormat) -> Tensor:
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


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has no threads


class PackedHalf(NamedTuple):
    """Keys or values of a layer: half pages, or a sequence's packed vectors and their scalars.

    Pages: uint8 [N, H, Y] each contiguous in itself, and None. Records: uint8 [B, H, T, P] and
    float16 [B, H, T], contiguous; fp8 has no scalars.
    """

    vectors: Tensor
    scalars: Tensor | None = None


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
        self.pages, self.group, self._cap = pages, group, softcap / _LN2
        permute = processor().permute if permute is None else permute
        self._code = compiled(DecodeSpec(pages, group, bool(softcap), permute))
        self._books = _books(pages)
        starts = value_lanes(pages.value.format)
        self._width = starts[-1]
        groups = zip(starts, pages.value.format.groups, strict=False)
        self._channels = [slice(at, at + part.channels) for at, part in groups]

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
        page of each `pages.tokens` tokens of a sequence; None for records. offset_BHG: float32,
        added to every score, as a query's product with the keys' mean. threads: torch's number by
        default; the result's bits do not depend on it.

        Returns float32 m [B, H, G], the greatest score (-1e30 · ln 2 for an empty range),
        l = Σ exp(s - m) [B, H, G] and Σ exp(s - m) · value [B, H, G, V], V the values' coded
        channels: divide by l, or merge with other tokens' sums first. ValueError for shapes,
        dtypes, pages and ranges that do not fit.
        """
        inputs = Inputs(query_BHGC, (keys, values), ranges, table_BW, offset_BHG)
        require(self.pages, self.group, inputs)
        batch, heads, group, _ = query_BHGC.shape
        splits = [_splits(*span) for span in ranges]
        most = max(1, *map(len, splits))
        # Explicit dtypes: a serving engine runs models under a bfloat16 default dtype.
        acc = torch.empty(
            (batch, heads, most, group, self._width), dtype=torch.float32, device="cpu"
        )
        ml = torch.empty((batch, heads, most, group, 2), dtype=torch.float32, device="cpu")
        if any(len(spans) < most for spans in splits):
            acc.zero_()
            ml[..., 0], ml[..., 1] = -1e30, 0.0
        query = (query_BHGC * (1 / _LN2)).contiguous()
        if offset_BHG is None:
            offset = query.new_zeros((batch, heads, group))
        else:
            offset = (offset_BHG.float() * (1 / _LN2)).contiguous()
        work = self._work(query, offset, (keys, values), table_BW, acc, ml)
        items = [
            (b, h, s, *span)
            for b, spans in enumerate(splits)
            for h in range(heads)
            for s, span in enumerate(spans)
        ]
        threads = threads or torch.get_num_threads()
        if threads > 1 and len(items) > 1:
            list(_pool(threads).map(work, items))
        else:
            for item in items:
                work(item)
        return self._merged(acc, ml)

    def _work(
        self,
        query: Tensor,
        offset: Tensor,
        halves: tuple[PackedHalf, PackedHalf],
        table: Tensor | None,
        acc: Tensor,
        ml: Tensor,
    ) -> Callable[[tuple[int, int, int, int, int]], None]:
        """Attends for a sequence, head and split, over tokens [first, last)."""
        call, books, cap = self._code.call, self._books.data_ptr(), self._cap
        key, value = (
            _places(half, packed)
            for half, packed in zip((self.pages.key, self.pages.value), halves, strict=True)
        )
        table_at, table_row = (0, 0) if table is None else (table.data_ptr(), 4 * table.stride(0))
        query_at, query_row, query_head = query.data_ptr(), *(4 * n for n in query.stride()[:2])
        offset_at, offset_row, offset_head = (
            offset.data_ptr(),
            *(4 * n for n in offset.stride()[:2]),
        )
        acc_at, ml_at = acc.data_ptr(), ml.data_ptr()
        acc_strides, ml_strides = ([4 * n for n in out.stride()[:3]] for out in (acc, ml))
        # A thread may still write when its caller was interrupted: it keeps what it reads.
        kept = (query, offset, halves, table, acc, ml)

        def work(item: tuple[int, int, int, int, int], _kept: object = kept) -> None:
            b, h, s, first, last = item
            call(
                *key.at(b, h),
                *value.at(b, h),
                table_at + b * table_row,
                first,
                last,
                query_at + b * query_row + h * query_head,
                offset_at + b * offset_row + h * offset_head,
                books,
                cap,
                acc_at + b * acc_strides[0] + h * acc_strides[1] + s * acc_strides[2],
                ml_at + b * ml_strides[0] + h * ml_strides[1] + s * ml_strides[2],
            )

        return work

    def _merged(self, acc: Tensor, ml: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Over splits; m in exponents of e; without the lanes that pad channel groups."""
        m, total = ml.unbind(-1)
        top = m[:, :, 0]
        if m.shape[2] == 1:
            total, out = total[:, :, 0], acc[:, :, 0]
        else:
            top = m.amax(2)
            weight = torch.exp2(m - top[:, :, None])
            total, out = (total * weight).sum(2), (acc * weight[..., None]).sum(2)
        if self._channels != [slice(0, self._width)]:
            out = torch.cat([out[..., part] for part in self._channels], dim=-1)
        return top * _LN2, total, out


class _Places(NamedTuple):
    """Addresses of a sequence's head: of its vectors and scalars, and bytes from page to page."""

    vectors: int
    scalars: int
    rows: tuple[int, int]
    heads: tuple[int, int]
    page: int

    def at(self, b: int, h: int) -> tuple[int, int, int]:
        return (
            self.vectors + b * self.rows[0] + h * self.heads[0],
            self.scalars + b * self.rows[1] + h * self.heads[1],
            self.page,
        )


def _places(half: HalfPage | Records, packed: PackedHalf) -> _Places:
    vectors = packed.vectors
    start = vectors.data_ptr()
    if isinstance(half, HalfPage):
        head = vectors.stride(1)
        return _Places(start, start + half.scalars, (0, 0), (head, head), vectors.stride(0))
    row, head = vectors.stride()[:2]
    if packed.scalars is None:
        return _Places(start, start, (row, row), (head, head), 0)
    scalar_row, scalar_head = (2 * n for n in packed.scalars.stride()[:2])
    return _Places(start, packed.scalars.data_ptr(), (row, scalar_row), (head, scalar_head), 0)


@cache
def decoder(pages: PageFormat | RecordFormat, group: int, softcap: float = 0.0) -> PackedDecoder:
    """One for each format; compiles at the first call."""
    return PackedDecoder(pages, group, softcap)


def _splits(first: int, last: int) -> list[tuple[int, int]]:
    """The same for any number of threads."""
    starts = range(first - first % SPLIT_TOKENS, last, SPLIT_TOKENS)
    return [(max(start, first), min(start + SPLIT_TOKENS, last)) for start in starts]
