"""True packing of b-bit indices into bytes, as bit planes.

A plane of p bits (p divides 8) splits the D indices into 8/p equal runs; byte j holds the j-th
index of every run, the first run in the lowest bits. For 4 bits the low nibble is thus dims
0…D/2-1 and the high nibble dims D/2…D-1, so that a decoded tile is two halves with no shuffle.

Widths that do not divide 8 are two planes, the low bits first: 3 = 2 + 1, 5 = 4 + 1. No index
straddles two bytes.

Shape suffixes: D head size (a multiple of 8), P packed bytes, ... any leading axes.
"""

import torch
from torch import Tensor

_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 8: (8,)}


def packed_bytes(dim: int, bits: int) -> int:
    """P, the bytes that hold `dim` indices of `bits` bits; ValueError as `pack`."""
    _planes(dim, bits)
    return dim * bits // 8


def pack(index_D: Tensor, bits: int) -> Tensor:
    """uint8 [..., D] of indices below 2^bits → uint8 [..., P].

    ValueError for another dtype, for bits not in 1…5 or 8, or D not a multiple of 8. Values are
    not checked: that would read them back from the device.
    """
    if index_D.dtype != torch.uint8:
        raise ValueError(f"expected indices of dtype torch.uint8, found {index_D.dtype}")
    planes, shift = [], 0
    for width in _planes(index_D.shape[-1], bits):
        planes.append(_pack_plane((index_D >> shift) & (2**width - 1), width))
        shift += width
    return planes[0] if len(planes) == 1 else torch.cat(planes, dim=-1)


def unpack(packed_P: Tensor, bits: int, dim: int) -> Tensor:
    """uint8 [..., P] → uint8 [..., D], the inverse of `pack`; ValueError when P does not fit."""
    widths = _planes(dim, bits)
    if packed_P.dtype != torch.uint8 or packed_P.shape[-1] != packed_bytes(dim, bits):
        raise ValueError(
            f"expected torch.uint8 with {packed_bytes(dim, bits)} bytes for {dim} indices of "
            f"{bits} bits, found {packed_P.dtype} with {packed_P.shape[-1]}"
        )
    first = dim * widths[0] // 8
    index_D = _unpack_plane(packed_P[..., :first], widths[0])
    if len(widths) == 2:
        index_D |= _unpack_plane(packed_P[..., first:], widths[1]) << widths[0]
    return index_D


def _planes(dim: int, bits: int) -> tuple[int, ...]:
    if bits not in _PLANES:
        raise ValueError(f"expected bits in {tuple(_PLANES)}, found {bits!r}")
    if dim <= 0 or dim % 8:
        raise ValueError(f"expected a head size that is a positive multiple of 8, found {dim}")
    return _PLANES[bits]


def _pack_plane(value_D: Tensor, width: int) -> Tensor:
    runs = value_D.chunk(8 // width, dim=-1)
    plane = runs[0].clone()
    for position, run in enumerate(runs[1:], start=1):
        plane |= run << (position * width)
    return plane


def _unpack_plane(plane: Tensor, width: int) -> Tensor:
    mask = 2**width - 1
    return torch.cat([(plane >> shift) & mask for shift in range(0, 8, width)], dim=-1)
