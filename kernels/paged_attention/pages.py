"""How packed keys and values lie in a page, the same for every kernel.

A page holds `tokens` tokens of one key/value head as a structure of arrays: the index planes of the
keys, those of the values, then one row of the keys' float16 scalars and one of the values'. A plane
of w bits of n channels is `tokens` rows of n·w/8 bytes (`turboquant.packing` says which bits are
whose), so that a tile of tokens is contiguous.

Shape suffixes: N pages, H key/value heads, Y bytes of a page, T tokens, P packed bytes of a vector.
"""

from collections.abc import Iterator
from dataclasses import dataclass
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

    group: its place among the groups. first: byte of the page where the plane begins. packed:
    byte of the packed vector where its row begins. shift: of its bits in the index.
    """

    group: int
    width: int
    shift: int
    row_bytes: int
    first: int
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

    def planes(self, tokens: int, first: int) -> Iterator[Plane]:
        """Of a page, one after another from its byte `first` on."""
        packed = 0
        for place, group in enumerate(self.groups):
            shift = 0
            for width in _PLANES[group.bits]:
                row = group.channels * width // 8
                yield Plane(place, width, shift, row, first, packed)
                shift += width
                first += tokens * row
                packed += row


@dataclass(frozen=True)
class PageFormat:
    """Keys and values of one layer. tokens: of a page, 16, 32, 64 or 128, else ValueError."""

    key: VectorFormat
    value: VectorFormat
    tokens: int

    def __post_init__(self) -> None:
        if self.tokens not in PAGE_TOKENS:
            raise ValueError(f"expected pages of {PAGE_TOKENS} tokens, found {self.tokens}")

    @cached_property
    def key_planes(self) -> tuple[Plane, ...]:
        """In the order of the packed bytes."""
        return tuple(self.key.planes(self.tokens, 0))

    @cached_property
    def value_planes(self) -> tuple[Plane, ...]:
        """In the order of the packed bytes."""
        return tuple(self.value.planes(self.tokens, self.tokens * self.key.packed))

    @property
    def key_scalars(self) -> int:
        """The byte where the row of the keys' scalars begins."""
        return self.tokens * (self.key.packed + self.value.packed)

    @property
    def value_scalars(self) -> int:
        """The byte where the row of the values' scalars begins."""
        return self.key_scalars + self.tokens * self.key.scalar_bytes

    @property
    def nbytes(self) -> int:
        """Y: bytes of a page of one head."""
        return self.value_scalars + self.tokens * self.value.scalar_bytes

    def empty(self, pages: int, heads: int, device: torch.device | str = "cpu") -> Tensor:
        """uint8 [N, H, Y] of zeros."""
        return torch.zeros((pages, heads, self.nbytes), dtype=torch.uint8, device=device)


def write_vectors(
    pages_NHY: Tensor,
    format: PageFormat,
    slots_T: Tensor,
    packed_HTP: Tensor,
    scalars_HT: Tensor | None,
    *,
    values: bool,
) -> None:
    """Put packed vectors of T tokens at their slots, page · tokens + place, in place.

    packed_HTP: uint8, as the codecs pack. scalars_HT: float16; None for fp8. ValueError for shapes
    that do not fit and slots out of range.
    """
    vectors = format.value if values else format.key
    heads, tokens, packed = packed_HTP.shape
    expected = (pages_NHY.shape[1], slots_T.numel(), vectors.packed)
    if (heads, tokens, packed) != expected or (scalars_HT is None) != vectors.is_fp8:
        raise ValueError(
            f"expected packed bytes {list(expected)} and scalars where there are any, found "
            f"{list(packed_HTP.shape)} and {'none' if scalars_HT is None else 'some'}"
        )
    limit = pages_NHY.shape[0] * format.tokens
    if tokens and not 0 <= int(slots_T.min()) <= int(slots_T.max()) < limit:
        raise ValueError(f"expected slots from 0 to {limit - 1}, found {slots_T.tolist()}")
    page_T, place_T = slots_T // format.tokens, slots_T % format.tokens
    for plane in format.value_planes if values else format.key_planes:
        rows = plane_rows(pages_NHY, format, plane.first, plane.row_bytes)
        row = packed_HTP[..., plane.packed : plane.packed + plane.row_bytes]
        rows[page_T, :, place_T] = row.transpose(0, 1)
    if scalars_HT is not None:
        first = format.value_scalars if values else format.key_scalars
        rows = plane_rows(pages_NHY, format, first, 2)
        rows[page_T, :, place_T] = (
            scalars_HT.contiguous().view(torch.uint8).view(heads, tokens, 2).transpose(0, 1)
        )


def plane_rows(pages_NHY: Tensor, format: PageFormat, first: int, row_bytes: int) -> Tensor:
    """A view, uint8 [N, H, tokens, row_bytes], of an array of every page."""
    part = pages_NHY[..., first : first + format.tokens * row_bytes]
    rows: Tensor = part.unflatten(-1, (format.tokens, row_bytes))
    return rows


def read_vectors(
    pages_NHY: Tensor, format: PageFormat, slots_T: Tensor, *, values: bool
) -> tuple[Tensor, Tensor | None]:
    """Packed bytes [H, T, P] and float16 scalars [H, T] at slots: the inverse of the writing."""
    page_T, place_T = slots_T // format.tokens, slots_T % format.tokens
    planes = format.value_planes if values else format.key_planes
    parts = [
        plane_rows(pages_NHY, format, plane.first, plane.row_bytes)[page_T, :, place_T]
        for plane in planes
    ]
    packed_HTP = torch.cat(parts, dim=-1).transpose(0, 1).contiguous()
    if (format.value if values else format.key).is_fp8:
        return packed_HTP, None
    first = format.value_scalars if values else format.key_scalars
    bytes_TH2 = plane_rows(pages_NHY, format, first, 2)[page_T, :, place_T].contiguous()
    return packed_HTP, bytes_TH2.view(torch.float16)[..., 0].T.contiguous()
