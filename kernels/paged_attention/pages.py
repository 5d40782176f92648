"""How packed keys and values lie in pages, the same for every kernel.

A half page holds `tokens` keys, or values, of one head as a structure of arrays: the index planes,
then one row of float16 scalars. A plane of w bits of n channels is `tokens` rows of n·w/8 bytes
(`turboquant.packing` says which bits are whose), so that a tile of tokens is contiguous. A page is
the half page of the keys and that of the values, one behind the other; a cache may as well keep
them apart.

Shape suffixes: N pages, H key/value heads, Y bytes of a half page, T tokens, P packed bytes of a
vector.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from stillhouse.kernels.turboquant import ChannelGroup, packed_bytes

PAGE_TOKENS = (16, 32, 64, 128)
FP8 = 8  # bits of a channel group that holds e4m3 numbers, without a scalar
_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), FP8: (FP8,)}


@dataclass(frozen=True, slots=True)
class Plane:
    """Rows of `row_bytes` bytes that hold `width` bits of each index of a channel group.

    group: its place among the groups. first: byte of the page where the plane begins; stride: from
    one token's row to the next. packed: byte of the packed vector where its row begins. shift: of
    its bits in the index.
    """

    group: int
    width: int
    shift: int
    row_bytes: int
    first: int
    stride: int
    packed: int


@dataclass(frozen=True)
class VectorFormat:
    """Coded channels in groups, each a multiple of 8 channels of 1 to 5 bits, or all in fp8.

    ValueError for others.
    """

    groups: tuple[ChannelGroup, ...]

    def __post_init__(self) -> None:
        bits = [group.bits for group in self.groups]
        sizes = all(group.channels > 0 and group.channels % 8 == 0 for group in self.groups)
        if not bits or not sizes or not (bits == [FP8] or set(bits) <= {1, 2, 3, 4, 5}):
            raise ValueError(
                "expected groups of 8, 16, … channels of 1 to 5 bits, or one of 8 bits (fp8), "
                f"found {self.groups}"
            )

    @classmethod
    def uniform(cls, channels: int, bits: int) -> "VectorFormat":
        """All channels alike."""
        return cls((ChannelGroup(channels, bits),))

    @property
    def is_fp8(self) -> bool:
        """Whether the vectors are 8-bit floats without a scalar."""
        return self.groups[0].bits == FP8

    @property
    def channels(self) -> int:
        """How many are coded."""
        return sum(group.channels for group in self.groups)

    @property
    def packed(self) -> int:
        """P."""
        return sum(packed_bytes(group.channels, group.bits) for group in self.groups)

    @property
    def scalar_bytes(self) -> int:
        """Of a vector."""
        return 0 if self.is_fp8 else 2


@dataclass(frozen=True)
class HalfPage:
    """Keys or values of one layer. tokens: of a page, 16, 32, 64 or 128, else ValueError."""

    format: VectorFormat
    tokens: int

    def __post_init__(self) -> None:
        if self.tokens not in PAGE_TOKENS:
            raise ValueError(f"expected pages of {PAGE_TOKENS} tokens, found {self.tokens}")

    @cached_property
    def planes(self) -> tuple[Plane, ...]:
        """In the order of the packed bytes."""
        return tuple(self._planes())

    def _planes(self) -> Iterator[Plane]:
        first = packed = 0
        for place, group in enumerate(self.format.groups):
            shift = 0
            for width in _PLANES[group.bits]:
                row = group.channels * width // 8
                yield Plane(place, width, shift, row, first, row, packed)
                shift += width
                first += self.tokens * row
                packed += row

    @property
    def scalars(self) -> int:
        """The byte where the row of scalars begins."""
        return self.tokens * self.format.packed

    @property
    def nbytes(self) -> int:
        """Y."""
        return self.scalars + self.tokens * self.format.scalar_bytes

    def empty(self, pages: int, heads: int, device: torch.device | str = "cpu") -> Tensor:
        """uint8 [N, H, Y] of zeros."""
        return torch.zeros((pages, heads, self.nbytes), dtype=torch.uint8, device=device)


@dataclass(frozen=True)
class Records:
    """Keys or values as the codecs pack them, one vector behind another, scalars apart: no pages.

    What a cache that grows by concatenation holds; a sequence's head is one page of any length.
    """

    format: VectorFormat

    @cached_property
    def planes(self) -> tuple[Plane, ...]:
        """In the order of the packed bytes."""
        pages = HalfPage(self.format, PAGE_TOKENS[0]).planes
        return tuple(replace(p, first=p.packed, stride=self.format.packed) for p in pages)


@dataclass(frozen=True)
class RecordFormat:
    """Keys and values of one layer."""

    key: Records
    value: Records
    tokens: int = 0  # of a page: there is but one

    @classmethod
    def of(cls, key: VectorFormat, value: VectorFormat) -> "RecordFormat":
        """As `PageFormat.of`."""
        return cls(Records(key), Records(value))


@dataclass(frozen=True)
class PageFormat:
    """Keys and values of one layer; a page has as many tokens of each."""

    key: HalfPage
    value: HalfPage

    @classmethod
    def of(cls, key: VectorFormat, value: VectorFormat, tokens: int) -> "PageFormat":
        """ValueError as `HalfPage`."""
        return cls(HalfPage(key, tokens), HalfPage(value, tokens))

    @property
    def tokens(self) -> int:
        """Of a page."""
        return self.key.tokens

    @property
    def nbytes(self) -> int:
        """Of a page of one head, both halves."""
        return self.key.nbytes + self.value.nbytes


def write_vectors(
    pages_NHY: Tensor,
    half: HalfPage,
    slots_T: Tensor,
    packed_HTP: Tensor,
    scalars_HT: Tensor | None,
) -> None:
    """Put packed vectors of T tokens at their slots, page · tokens + place, in place.

    pages_NHY: of the half, with any strides. packed_HTP: uint8, as the codecs pack. scalars_HT:
    float16; None for fp8. ValueError for shapes that do not fit and slots out of range.
    """
    heads, tokens, packed = packed_HTP.shape
    expected = (pages_NHY.shape[1], slots_T.numel(), half.format.packed)
    if (heads, tokens, packed) != expected or (scalars_HT is None) != half.format.is_fp8:
        raise ValueError(
            f"expected packed bytes {list(expected)} and scalars where there are any, found "
            f"{list(packed_HTP.shape)} and {'none' if scalars_HT is None else 'some'}"
        )
    limit = pages_NHY.shape[0] * half.tokens
    if tokens and not 0 <= int(slots_T.min()) <= int(slots_T.max()) < limit:
        raise ValueError(f"expected slots from 0 to {limit - 1}, found {slots_T.tolist()}")
    page_T, place_T = slots_T // half.tokens, slots_T % half.tokens
    for plane in half.planes:
        rows = plane_rows(pages_NHY, half, plane.first, plane.row_bytes)
        row = packed_HTP[..., plane.packed : plane.packed + plane.row_bytes]
        rows[page_T, :, place_T] = row.transpose(0, 1)
    if scalars_HT is not None:
        rows = plane_rows(pages_NHY, half, half.scalars, 2)
        bytes_HT2 = scalars_HT.unsqueeze(-1).view(torch.uint8)
        rows[page_T, :, place_T] = bytes_HT2.transpose(0, 1)


def plane_rows(pages_NHY: Tensor, half: HalfPage, first: int, row_bytes: int) -> Tensor:
    """A view, uint8 [N, H, tokens, row_bytes], of an array of every page."""
    part = pages_NHY[..., first : first + half.tokens * row_bytes]
    rows: Tensor = part.unflatten(-1, (half.tokens, row_bytes))
    return rows


def read_vectors(
    pages_NHY: Tensor, half: HalfPage, slots_T: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Packed bytes [H, T, P] and float16 scalars [H, T] at slots: the inverse of the writing."""
    page_T, place_T = slots_T // half.tokens, slots_T % half.tokens
    parts = [
        plane_rows(pages_NHY, half, plane.first, plane.row_bytes)[page_T, :, place_T]
        for plane in half.planes
    ]
    packed_HTP = torch.cat(parts, dim=-1).transpose(0, 1).contiguous()
    if half.format.is_fp8:
        return packed_HTP, None
    bytes_TH2 = plane_rows(pages_NHY, half, half.scalars, 2)[page_T, :, place_T].contiguous()
    return packed_HTP, bytes_TH2.view(torch.float16)[..., 0].T.contiguous()
