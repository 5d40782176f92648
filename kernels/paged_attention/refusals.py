"""What decode attention refuses, before any pointer is followed.

Shape suffixes as in `cpu`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stillhouse.kernels.paged_attention.pages import HalfPage, Records

LEAST_RECORDS = 16  # a block of tokens; it reaches back, never past the end
LEAST_DIM = 16  # head size of tokens in 16 bits: the lanes of a vector
_HALF = (torch.float16, torch.bfloat16)


def require_least(name: str, found: int | None, least: int) -> None:
    """ValueError for a number below the least; None is a choice of its own."""
    if found is not None and found < least:
        raise ValueError(f"expected {name} of {least} or more, found {found}")


class Inputs(NamedTuple):
    """What is read by address; see `cpu.PackedDecoder.attend`. packed: `PackedHalf`s."""

    query: Tensor
    packed: tuple[Any, Any]
    offset: Tensor | None


class HalfShape(NamedTuple):
    """What keys or values must look like. size: bytes of a half page, or of a record."""

    name: str
    paged: bool
    size: int
    scalars: int  # byte of a half page where they begin
    is_fp8: bool
    channels: int

    @classmethod
    def of(cls, name: str, half: HalfPage | Records) -> "HalfShape":
        """Kept by who attends: a format adds its sizes up anew each time it is asked."""
        size, scalars = half.format.packed, 0
        if isinstance(half, HalfPage):
            size, scalars = half.nbytes, half.scalars
        paged, format = isinstance(half, HalfPage), half.format
        return cls(name, paged, size, scalars, format.is_fp8, format.channels)


def require(key: HalfShape, value: HalfShape, group: int, inputs: Inputs) -> None:
    """ValueError, with what was expected and found."""
    query, packed, offset = inputs
    batch, heads = query.shape[:2]
    wanted = (batch, heads, group, key.channels)
    if query.dtype != torch.float32 or query.shape != wanted:
        raise ValueError(
            f"expected float32 queries {list(wanted)}, found {query.dtype} {list(query.shape)}"
        )
    if offset is not None and offset.shape != wanted[:3]:
        raise ValueError(f"expected offsets {list(wanted[:3])}, found {list(offset.shape)}")
    for tensor in (query, offset, *packed[0], *packed[1]):
        if tensor is not None and not tensor.is_cpu:
            raise ValueError(f"expected tensors on the CPU, found one on {tensor.device}")
    for half, tensors in zip((key, value), packed, strict=True):
        if half.paged:
            _require_pages(half, tensors.vectors, heads)
        else:
            _require_records(half, tensors, batch, heads)


class Places(NamedTuple):
    """Where the packed tokens lie that sequences see; see `places_of`."""

    ranges: Sequence[tuple[int, int]]
    page: int
    table: Tensor | None
    first: int  # of the pages in use, or of the records
    end: int

    def require_within(self, packed: tuple[Any, Any]) -> None:
        """ValueError unless the halves have so many pages or records."""
        count = min(half.vectors.shape[0 if self.page else 2] for half in packed)
        if self.first >= 0 and self.end <= count:
            return
        if self.page:
            raise ValueError(
                f"expected pages from 0 to {count - 1}, found {self.first} to {self.end - 1}"
            )
        raise ValueError(
            f"expected {len(self.ranges)} ranges within {count} tokens, found {list(self.ranges)}"
        )


def places_of(ranges: Sequence[tuple[int, int]], page: int, table_BW: Tensor | None) -> Places:
    """Of tokens [first, last) of each sequence; ValueError for what no page or record is.

    page: its tokens, 0 for records. table_BW: see `cpu_plan.DecodePlan`.
    """
    if not page:
        if any(first < 0 or 0 < last < LEAST_RECORDS for first, last in ranges):
            raise ValueError(
                f"expected ranges from 0 on that end at {LEAST_RECORDS} or later, found {ranges}"
            )
        return Places(ranges, 0, None, 0, max((last for _, last in ranges), default=0))
    table_BW = _require_table(table_BW, len(ranges))
    most = table_BW.shape[-1] * page
    if any(first < 0 or last > most for first, last in ranges):
        raise ValueError(
            f"expected {len(ranges)} ranges within {most} tokens, found {list(ranges)}"
        )
    # Of pages that no range uses the entries may be anything, as a server's -1; numpy's calls take
    # a third of torch's time.
    ends = [(first // page, -(-last // page) if first < last else 0) for first, last in ranges]
    ends_B2 = np.array(ends, dtype=np.int32).reshape(-1, 2)
    place_W = np.arange(table_BW.shape[1], dtype=np.int32)
    used_BW = (place_W >= ends_B2[:, :1]) & (place_W < ends_B2[:, 1:])
    used = table_BW.numpy()[used_BW]
    first, end = (int(used.min()), int(used.max()) + 1) if used.size else (0, 0)
    return Places(ranges, page, table_BW, first, end)


def _require_pages(half: HalfShape, tensor: Tensor, heads: int) -> None:
    fits = tensor.dtype == torch.uint8 and tensor.ndim == 3 and tensor.stride(-1) == 1
    if not fits or tensor.shape[1:] != (heads, half.size):
        raise ValueError(
            f"expected half pages of {half.name}, uint8 {[tensor.shape[0], heads, half.size]}, "
            f"each contiguous, found {tensor.dtype} {list(tensor.shape)} with strides "
            f"{tensor.stride()}"
        )


def _require_records(half: HalfShape, packed: Any, batch: int, heads: int) -> None:
    vectors, scalars = packed.vectors, packed.scalars
    shape = (batch, heads, vectors.shape[2] if vectors.ndim == 4 else 0, half.size)
    fits = vectors.dtype == torch.uint8 and vectors.shape == shape
    fits = fits and vectors.stride()[2:] == (half.size, 1)
    if half.is_fp8:
        fits = fits and scalars is None
    else:
        fits = fits and scalars is not None and scalars.dtype == torch.float16
        fits = fits and scalars.shape == shape[:3] and scalars.stride(-1) == 1
    if not fits:
        raise ValueError(
            f"expected packed {half.name}, uint8 {list(shape)} and float16 scalars where there are "
            f"any, contiguous, found {vectors.dtype} {list(vectors.shape)} and "
            f"{None if scalars is None else list(scalars.shape)}"
        )


def _require_table(table: Tensor | None, batch: int) -> Tensor:
    fits = table is not None and table.dtype == torch.int32 and table.ndim == 2
    fits = fits and table is not None and table.is_cpu and table.stride(-1) == 1
    if table is None or not fits or table.shape[0] != batch:
        found = None if table is None else f"{table.dtype} {list(table.shape)}"
        raise ValueError(f"expected an int32 table of {batch} rows, found {found}")
    return table


def require_raw(raw: Any, shape: Sequence[int], ends: tuple[int, int]) -> None:
    """ValueError unless tokens in 16 bits (`cpu.RawTokens`) fit queries [B, H, G, C].

    ends: of the tokens that are seen of both parts.
    """
    batch, heads, group = shape[:3]
    query, mean = raw.query_BHGD, raw.mean_HD
    dim = query.shape[-1]
    fits = query.dtype == torch.float32 and query.shape == (batch, heads, group, dim)
    if not fits or dim < LEAST_DIM:
        raise ValueError(
            f"expected float32 queries {[batch, heads, group]} of {LEAST_DIM} channels or more, "
            f"found {query.dtype} {list(query.shape)}"
        )
    if mean is not None and (mean.dtype != torch.float32 or mean.shape != (heads, dim)):
        raise ValueError(
            f"expected float32 means {[heads, dim]}, found {mean.dtype} {list(mean.shape)}"
        )
    kinds = [tensor.dtype for tensor in raw.parts[0]]
    for part in raw.parts:
        wanted = (batch, heads, part[0].shape[2], dim)
        for tensor, kind in zip(part, kinds, strict=True):
            fits = tensor.dtype == kind and tensor.shape == wanted and tensor.stride(-1) == 1
            if not fits or not tensor.is_cpu or kind not in _HALF:
                raise ValueError(
                    f"expected keys and values in 16 bits {list(wanted)} on the CPU, the last axis "
                    f"contiguous, found {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
                )
    counts = [keys.shape[2] for keys, _ in raw.parts]
    if ends[0] > counts[0] or ends[1] > counts[1]:
        raise ValueError(f"expected raw ranges within {counts} tokens, found some to {list(ends)}")


def require_chunk(chunk: Any, shape: Sequence[int], spans: Sequence[Any], group: int) -> None:
    """ValueError unless raw tokens (`cpu_chunk.ChunkTokens`) fit rows [B, H, M, C] and spans."""
    batch, heads, rows = shape[:3]
    query, keys, values = chunk.query_BHMD, chunk.key_BHRD, chunk.value_BHRD
    if len(spans) != batch:
        raise ValueError(f"expected spans of {batch} sequences, found {len(spans)}")
    if rows % group or not rows:
        raise ValueError(f"expected rows of {group} queries a token, found {rows}")
    count, dim = keys.shape[2] if keys.ndim == 4 else 0, query.shape[-1]
    for name, tensor, wanted in (
        ("queries", query, (batch, heads, rows, dim)),
        ("raw keys", keys, (batch, heads, count, dim)),
        ("raw values", values, (batch, heads, count, dim)),
    ):
        if tensor.dtype != torch.float32 or tensor.shape != wanted or not tensor.is_cpu:
            raise ValueError(
                f"expected float32 {name} {list(wanted)} on the CPU, found {tensor.dtype} "
                f"{list(tensor.shape)} on {tensor.device}"
            )
    if count < rows // group:
        raise ValueError(
            f"expected raw tokens of {rows // group} queries' tokens or more, found {count}"
        )
    before = count - rows // group
    for span in spans:
        if span.position < span.last or not 0 <= span.hidden <= before:
            raise ValueError(
                f"expected a place of the chunk past its history, and up to {before} hidden raw "
                f"tokens, found {span}"
            )
