"""PolarQuant (arXiv:2502.02617): the angles of a recursive polar transform, a reference codec.

Rotate, then replace neighbours (a, b) by their radius and angle, and the radii again, four times:
16 coordinates become 8 + 4 + 2 + 1 angles and one float16 radius (§3.1, Algorithm 1). For Gaussian
coordinates all angles are independent, those of level 1 uniform on the circle and those of level l
with a density ∝ sin^(2^(l-1) - 1)(2ψ) on [0, π/2] (Lemma 2), so each level has one fixed codebook.

4, 2, 2 and 2 bits make 46 bits and 16 of the radius: 62 bits for 16 coordinates, 3.875 each. The
relative mean squared error on Gaussian vectors is 2 (1 - Π E[cos(ψ_l - ψ̂_l)]), 0.0321. TurboQuant
uses no polar coordinates; this codec is here to be compared with.

What is not finite is treated as `codec` has it, by the radius of each 16 coordinates.

Shape suffixes: D head size, B = D/16 blocks, P and Q packed bytes, N any number, ... leading axes.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from stillhouse.kernels.turboquant.codebook import lloyd_max_codebook
from stillhouse.kernels.turboquant.codec import NotFiniteError
from stillhouse.kernels.turboquant.contract import nbytes_of
from stillhouse.kernels.turboquant.inputs import require_vectors
from stillhouse.kernels.turboquant.laws import angle_law
from stillhouse.kernels.turboquant.packing import pack, packed_bytes, unpack
from stillhouse.kernels.turboquant.precision import in_float32
from stillhouse.kernels.turboquant.rotation import Rotation

POLAR_BLOCK = 16
POLAR_BITS = (4, 2, 2, 2)  # of the angles of level 1, 2, 3, 4
_UPPER = POLAR_BLOCK // 4 + POLAR_BLOCK // 8 + POLAR_BLOCK // 16  # 7 angles of levels 2 to 4


@dataclass(frozen=True, slots=True)
class AngleCodebook:
    """centroids: 2^bits ascending angles. boundaries: the edges between neighbouring cells.

    On the circle there is one boundary more, and the cell above the last is the first again.
    """

    centroids: tuple[float, ...]
    boundaries: tuple[float, ...]


@cache
def angle_codebook(level: int, bits: int) -> AngleCodebook:
    """Least mean squared error of the angles of one level.

    Level 1 is uniform on the circle: equal arcs, with one centroid on each axis so that rotated
    unit vectors, whose coordinates have one magnitude, lie on centroids and not on edges. Levels
    from 2 on are Lloyd–Max. ValueError for levels below 1 and bits outside SUPPORTED_BITS.
    """
    if level == 1:
        arc = 2 * math.pi / 2**bits
        centroids = tuple(-math.pi + arc * i for i in range(2**bits))
        return AngleCodebook(centroids, tuple(c + arc / 2 for c in centroids))
    angles = angle_law(level)
    book = lloyd_max_codebook(bits, angles.law)

    def place(values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(math.pi / 4 + angles.deviation * x for x in values)

    return AngleCodebook(place(book.centroids), place(book.boundaries))


@dataclass(frozen=True, slots=True)
class PolarVectors:
    """Encoded vectors: tensors with the same leading axes.

    circle: uint8 [..., P], the packed indices of level 1, D/2 of 4 bits. upper: uint8 [..., Q],
    those of levels 2 to 4, 7D/16 of 2 bits, up to a whole byte. radii: float16 [..., B].
    """

    circle: Tensor
    upper: Tensor
    radii: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the storage behind the tensors, also where they are views of a part of it."""
        return nbytes_of(self)

    def require_finite(self) -> None:
        """NotFiniteError when a vector could not be stored; makes the host wait for the device."""
        broken_N = torch.isfinite(self.radii).logical_not().any(dim=-1)
        broken = int(broken_N.sum())
        if broken:
            raise NotFiniteError(
                f"expected finite vectors with {POLAR_BLOCK} rotated coordinates of a norm that "
                f"float16 holds (65,504), found {broken} of {broken_N.numel()} that are NaN, "
                "infinite or larger; keep this layer's cache in 16 bits, or find the layer that "
                "overflows"
            )


class PolarCodec:
    """One instance a head size; its tables lie on one device.

    head_dim: D, a positive multiple of 16, else ValueError. seed: of the rotation's signs.
    """

    def __init__(self, head_dim: int, seed: int = 0, *, device: torch.device | str = "cpu") -> None:
        if head_dim <= 0 or head_dim % POLAR_BLOCK:
            raise ValueError(
                f"expected a head size that is a positive multiple of {POLAR_BLOCK}, "
                f"found {head_dim}"
            )
        self.head_dim, self.seed = head_dim, seed
        self.rotation = Rotation.seeded(head_dim, seed, device)
        self._levels = [
            _AngleTable.on(angle_codebook(level, bits), device)
            for level, bits in enumerate(POLAR_BITS, start=1)
        ]

    @property
    def bytes_per_vector(self) -> int:
        """Bytes stored for one vector: 31 for 64 coordinates.

        Where D is no multiple of 64 the 14 bits of levels 2 to 4 for each 16 coordinates do not
        fill bytes, and up to 6 bits of padding are counted.
        """
        circle = packed_bytes(self.head_dim // 2, POLAR_BITS[0])
        return circle + packed_bytes(_padded(2 * self._upper_count), 1) + 2 * self._blocks

    @property
    def nbytes(self) -> int:
        """Bytes of the codec's tables: rotation, cosines, sines and boundaries."""
        rotation = (self.rotation.signs, self.rotation.matrix)
        levels = sum(nbytes_of(table) for table in self._levels)
        return levels + sum(table.untyped_storage().nbytes() for table in rotation)

    @in_float32
    def encode(self, x_D: Tensor) -> PolarVectors:
        """float32/float16/bfloat16 [..., D] → packed vectors; the arithmetic is float32.

        ValueError for another dtype or last axis, and NotFiniteError on the CPU for vectors that
        are not finite or exceed float16.
        """
        require_vectors(x_D, self.head_dim)
        radius = self.rotation.rotate(x_D.detach().float())
        indices = []
        for table in self._levels:
            first, second = radius[..., 0::2], radius[..., 1::2]
            indices.append(table.index(torch.atan2(second, first)))
            radius = torch.hypot(first, second)
        circle, upper = pack(indices[0], POLAR_BITS[0]), _pack_pairs(torch.cat(indices[1:], dim=-1))
        packed = PolarVectors(circle, upper, radius.half())
        if x_D.device.type == "cpu":
            packed.require_finite()
        return packed

    @in_float32
    def decode(self, packed: PolarVectors, dtype: torch.dtype = torch.float32) -> Tensor:
        """Packed vectors → `dtype` [..., D]; float32 arithmetic, rounded once at the end."""
        circle = unpack(packed.circle, POLAR_BITS[0], self.head_dim // 2)
        upper = _unpack_pairs(packed.upper, self._upper_count)
        sizes = [self.head_dim >> level for level in range(2, len(POLAR_BITS) + 1)]
        indices = [circle, *upper.split(sizes, dim=-1)]
        radius = packed.radii.float()
        for table, index in zip(reversed(self._levels), reversed(indices), strict=True):
            radius = table.divide(radius, index)
        return self.rotation.rotate_back(radius).to(dtype)

    @property
    def _blocks(self) -> int:
        return self.head_dim // POLAR_BLOCK

    @property
    def _upper_count(self) -> int:
        return _UPPER * self._blocks


@dataclass(frozen=True, slots=True)
class _AngleTable:
    """An AngleCodebook on a device, float32: cosines and sines [K] of its centroids, boundaries."""

    cosines: Tensor
    sines: Tensor
    boundaries: Tensor

    @classmethod
    def on(cls, book: AngleCodebook, device: torch.device | str) -> "_AngleTable":
        # Explicit dtype: a serving engine builds models under a bfloat16 default dtype.
        rows = ([math.cos(c) for c in book.centroids], [math.sin(c) for c in book.centroids])
        return cls(
            *(torch.tensor(r, dtype=torch.float32, device=device) for r in (*rows, book.boundaries))
        )

    def index(self, angle_N: Tensor) -> Tensor:
        """uint8 [..., N]: the nearest centroid of angles in [-π, π]; on an edge the one below."""
        cell_N = torch.bucketize(angle_N, self.boundaries, out_int32=True)
        return (cell_N % self.cosines.numel()).to(torch.uint8)

    def divide(self, radius_N: Tensor, index_N: Tensor) -> Tensor:
        """float32 [..., 2N]: radii r [..., N] as (r cos ψ, r sin ψ), side by side."""
        cosine_N, sine_N = (
            table.index_select(0, index_N.reshape(-1).int()).view(index_N.shape)
            for table in (self.cosines, self.sines)
        )
        return torch.stack((radius_N * cosine_N, radius_N * sine_N), dim=-1).flatten(-2)


def _padded(count: int) -> int:
    """The next multiple of 8."""
    return -(-count // 8) * 8


def _pack_pairs(index_N: Tensor) -> Tensor:
    """2-bit indices [..., N], any N, → uint8 [..., Q]: low bits, high bits, zeros to a byte.

    `pack` at 2 bits takes multiples of 8 and would pad 28 indices (D = 64) by another byte.
    """
    bits = torch.cat((index_N & 1, index_N >> 1), dim=-1)
    padding = _padded(bits.shape[-1]) - bits.shape[-1]
    return pack(torch.nn.functional.pad(bits, (0, padding)), 1)


def _unpack_pairs(packed_Q: Tensor, count: int) -> Tensor:
    """uint8 [..., Q] → uint8 [..., N = count], the inverse of `_pack_pairs`."""
    bits = unpack(packed_Q, 1, _padded(2 * count))
    return bits[..., :count] | bits[..., count : 2 * count] << 1
