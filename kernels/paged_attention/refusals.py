"""What decode attention refuses, before any pointer is followed.

Shape suffixes as in `cpu`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stillhouse.kernels.paged_attention.pages import HalfPage, PageFormat, RecordFormat, Records

LEAST_RECORDS = 16  # a block of tokens; it reaches back, never past the end


class Inputs(NamedTuple):
    """What is read by address; see `cpu.PackedDecoder.attend`. packed: `PackedHalf`s."""

    query: Tensor
    packed: tuple[Any, Any]
    ranges: Sequence[tuple[int, int]]
    table: Tensor | None
    offset: Tensor | None


def require(pages: PageFormat | RecordFormat, group: int, inputs: Inputs) -> None:
    """ValueError, with what was expected and found."""
    query, packed, ranges, table, offset = inputs
    batch, heads = query.shape[:2]
    wanted = (batch, heads, group, pages.key.format.channels)
    if query.dtype != torch.float32 or query.shape != wanted:
        raise ValueError(
            f"expected float32 queries {list(wanted)}, found {query.dtype} {list(query.shape)}"
        )
    if offset is not None and offset.shape != wanted[:3]:
        raise ValueError(f"expected offsets {list(wanted[:3])}, found {list(offset.shape)}")
    for tensor in (query, table, offset, *(part for half in packed for part in half)):
        if tensor is not None and tensor.device.type != "cpu":
            raise ValueError(f"expected tensors on the CPU, found one on {tensor.device}")
    counts = []
    for name, half, tensors in zip(
        ("keys", "values"), (pages.key, pages.value), packed, strict=True
    ):
        if isinstance(half, HalfPage):
            _require_pages(name, half, tensors.vectors, heads)
        else:
            _require_records(name, half, tensors, batch, heads)
        counts.append(tensors.vectors.shape[0 if isinstance(half, HalfPage) else 2])
    if isinstance(pages, RecordFormat):
        _require_ranges(ranges, batch, min(counts))
        if any(0 < last < LEAST_RECORDS for _, last in ranges):
            raise ValueError(
                f"expected ranges that end at {LEAST_RECORDS} or later, found {ranges}"
            )
        return
    _require_table(table, batch, min(counts))
    assert table is not None
    _require_ranges(ranges, batch, table.shape[-1] * pages.tokens)


def _require_pages(name: str, half: HalfPage, tensor: Tensor, heads: int) -> None:
    shape = (tensor.shape[0], heads, half.nbytes)
    if tensor.dtype != torch.uint8 or tensor.shape != shape or tensor.stride(-1) != 1:
        raise ValueError(
            f"expected half pages of {name}, uint8 {list(shape)}, each contiguous, found "
            f"{tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
        )


def _require_records(name: str, half: Records, packed: Any, batch: int, heads: int) -> None:
    vectors, scalars = packed.vectors, packed.scalars
    size = half.format.packed
    shape = (batch, heads, vectors.shape[2] if vectors.ndim == 4 else 0, size)
    fits = vectors.dtype == torch.uint8 and vectors.shape == shape
    fits = fits and vectors.stride()[2:] == (size, 1)
    if half.format.is_fp8:
        fits = fits and scalars is None
    else:
        fits = fits and scalars is not None and scalars.dtype == torch.float16
        fits = fits and scalars.shape == shape[:3] and scalars.stride(-1) == 1
    if not fits:
        raise ValueError(
            f"expected packed {name}, uint8 {list(shape)} and float16 scalars where there are any, "
            f"contiguous, found {vectors.dtype} {list(vectors.shape)} and "
            f"{None if scalars is None else list(scalars.shape)}"
        )


def _require_table(table: Tensor | None, batch: int, count: int) -> None:
    fits = table is not None and table.dtype == torch.int32 and table.ndim == 2
    if table is None or not fits or table.stride(-1) != 1 or table.shape[0] != batch:
        found = None if table is None else f"{table.dtype} {list(table.shape)}"
        raise ValueError(f"expected an int32 table of {batch} rows, found {found}")
    least, most = (int(end) for end in table.aminmax()) if table.numel() else (0, -1)
    if least < 0 or most >= count:
        raise ValueError(f"expected pages from 0 to {count - 1}, found {least} to {most}")


def _require_ranges(ranges: Sequence[tuple[int, int]], batch: int, limit: int) -> None:
    if len(ranges) != batch or any(first < 0 or last > limit for first, last in ranges):
        raise ValueError(f"expected {batch} ranges within {limit} tokens, found {list(ranges)}")
