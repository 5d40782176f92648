"""The codec fitted to one layer's heads: a mean, a linear map, channel groups, one scalar.

z = T (x - μ) with μ and T of the head, without the channels of 0 bits; z / ‖z‖ · √C is rounded as
in the mse codec (arXiv:2504.19874, Algorithm 1), but each group of channels with its own codebook.
T is the balanced map (`balance`), each group rotated in itself and divided by its root mean spread,
so that all channels have variance 1 and one float16 scalar serves the vector. The errors of a group
with mean spread v cost v² what they cost with v = 1: the scalar is the estimator of that weighted
inner product (`unbiased`, for keys) or of least weighted error (`least_squares`, for values).

Shape suffixes: B sequences, H heads, T tokens, D head size, C coded channels, P packed bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from stillhouse.kernels.turboquant.balance import BalancedBasis, ChannelGroup
from stillhouse.kernels.turboquant.codebook import gaussian_codebook
from stillhouse.kernels.turboquant.codec import PackedVectors, on_cpu
from stillhouse.kernels.turboquant.inputs import require_vectors
from stillhouse.kernels.turboquant.packing import pack, packed_bytes, unpack
from stillhouse.kernels.turboquant.precision import in_float32
from stillhouse.kernels.turboquant.sketch import haar_matrix

if TYPE_CHECKING:
    from stillhouse.kernels.turboquant.cpu_codec import CpuTables

FittedScalar = Literal["unbiased", "least_squares"]
_TINY = 1e-20


@dataclass(frozen=True, slots=True)
class HeadFit:
    """What is known of a layer's keys or values, float32 on one device.

    mean_HD: μ. map_HDD: T, its columns contiguous (see `in_columns`). inverse_HDD: T^-1. Both maps
    are None where T is the identity: the model itself makes mapped vectors. weight_HD: cost of a
    unit error in each coded channel. groups: of consecutive channels, D in all, the same for every
    head.
    """

    mean_HD: Tensor
    map_HDD: Tensor | None
    inverse_HDD: Tensor | None
    weight_HD: Tensor
    groups: tuple[ChannelGroup, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All there are."""
        tensors = (self.mean_HD, self.map_HDD, self.inverse_HDD, self.weight_HD)
        return tuple(tensor for tensor in tensors if tensor is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors)

    def to(self, device: torch.device | str) -> "HeadFit":
        """The same on another device."""
        return HeadFit(
            self.mean_HD.to(device),
            None if self.map_HDD is None else self.map_HDD.to(device),
            None if self.inverse_HDD is None else self.inverse_HDD.to(device),
            self.weight_HD.to(device),
            self.groups,
        )

    def without_map(self) -> "HeadFit":
        """For a model that makes T x where it made x."""
        if self.map_HDD is None:
            return self
        mean_HD = (self.map_HDD.double() @ self.mean_HD.double()[..., None])[..., 0].float()
        return HeadFit(mean_HD, None, None, self.weight_HD, self.groups)


def in_columns(map_HDD: Tensor) -> Tensor:
    """The same matrices, column by column in memory, as the loops on a CPU read them."""
    return map_HDD.mT.contiguous().mT


def fit_heads(
    mean_HD: Tensor, basis: BalancedBasis, groups: Sequence[ChannelGroup], seed: int = 0
) -> HeadFit:
    """The fit for vectors of this mean whose centred covariance and weight gave `basis`.

    seed: of the rotations inside the groups. ValueError when the groups do not cover D.
    """
    dim = basis.spread_HD.shape[-1]
    if sum(group.channels for group in groups) != dim:
        raise ValueError(f"expected groups of {dim} channels in all, found {list(groups)}")
    map_HDD, weight_HD = torch.empty_like(basis.map_HDD), torch.empty_like(basis.spread_HD)
    start = 0
    for number, group in enumerate(groups):
        rows = slice(start, start + group.channels)
        spread_H = basis.spread_HD[:, rows].mean(-1)
        rotation = haar_matrix(group.channels, seed + number).to(basis.map_HDD.device)
        map_HDD[:, rows] = rotation @ basis.map_HDD[:, rows] / spread_H.sqrt()[:, None, None]
        weight_HD[:, rows] = spread_H.square()[:, None]
        start = rows.stop
    # The scale of the weights changes nothing; theirs is often below float32's normal range.
    weight_HD = weight_HD / weight_HD.amax(-1, keepdim=True)
    inverse_HDD = torch.linalg.inv(map_HDD)
    return HeadFit(
        mean_HD.float(),
        in_columns(map_HDD.float()),
        inverse_HDD.float(),
        weight_HD.float(),
        tuple(groups),
    )


class FittedCodec:
    """Encodes one layer's keys or values as its fit says; the tables lie on the fit's device."""

    def __init__(self, fit: HeadFit, scalar: FittedScalar) -> None:
        if scalar not in ("unbiased", "least_squares"):
            raise ValueError(f"expected `unbiased` or `least_squares`, found {scalar!r}")
        self.fit, self.scalar = fit, scalar
        self.heads, self.head_dim = fit.mean_HD.shape
        device = fit.mean_HD.device
        self._groups = tuple(group for group in fit.groups if group.bits)
        self._coded = sum(group.channels for group in self._groups)
        self._centroids: dict[int, Tensor] = {}
        self._boundaries: dict[int, Tensor] = {}
        for bits in {group.bits for group in self._groups}:
            book = gaussian_codebook(bits)
            # Explicit dtypes: a serving engine builds models under a bfloat16 default dtype.
            self._centroids[bits] = torch.tensor(book.centroids, dtype=torch.float32, device=device)
            self._boundaries[bits] = torch.tensor(
                book.boundaries, dtype=torch.float32, device=device
            )

    @property
    def bytes_per_vector(self) -> int:
        """Bytes stored for one vector: every group's packed indices and the float16 scalar."""
        return 2 + sum(packed_bytes(group.channels, group.bits) for group in self._groups)

    @property
    def nbytes(self) -> int:
        """Bytes of the tables: the fit, codebooks, what the compiled loops read beside."""
        books = (*self._centroids.values(), *self._boundaries.values())
        own = self.fit.nbytes + sum(book.untyped_storage().nbytes() for book in books)
        tables = (*self.fit.tensors, *books)
        return own + (self.cpu_tables.bytes_apart(tables) if "cpu_tables" in self.__dict__ else 0)

    @in_float32
    def encode(self, x_BHTD: Tensor) -> PackedVectors:
        """float32/float16/bfloat16 [B, H, T, D] → packed vectors [B, H, T]; float32 arithmetic.

        Raises as `MseCodec.encode`; H must be the fit's too.
        """
        require_vectors(x_BHTD, self.head_dim, self.heads)
        return self.cpu_tables.encode(x_BHTD) if on_cpu(x_BHTD) else self.encode_reference(x_BHTD)

    def encode_reference(self, x_BHTD: Tensor) -> PackedVectors:
        """As `encode` on any device, by PyTorch; refuses nothing."""
        centred_BHTD = x_BHTD.detach().float() - self.fit.mean_HD[:, None]
        unit_BHTC, norm_BHT = self._unit(centred_BHTD)
        planes, centroids = [], []
        for group, part in zip(self._groups, self._split(unit_BHTC), strict=True):
            index = torch.bucketize(part.contiguous(), self._boundaries[group.bits], out_int32=True)
            planes.append(pack(index.to(torch.uint8), group.bits))
            centroids.append(self._look_up(index, group.bits))
        scalars_BHT = norm_BHT * self._factor(unit_BHTC, torch.cat(centroids, dim=-1))
        return PackedVectors(torch.cat(planes, dim=-1), scalars_BHT.half())

    @in_float32
    def decode(self, packed: PackedVectors, dtype: torch.dtype = torch.float32) -> Tensor:
        """Packed vectors → `dtype` [B, H, T, D]; float32 arithmetic, rounded once at the end."""
        if on_cpu(packed.scalars):
            coded_BHTC = self.cpu_tables.decode(packed.indices, self._scale(packed))
        else:
            coded_BHTC = self._coded_vectors(packed)
        return (self.from_coded(coded_BHTC) + self.fit.mean_HD[:, None]).to(dtype)

    def decode_reference(self, packed: PackedVectors) -> Tensor:
        """As `decode` to float32 on any device, by PyTorch."""
        return self.from_coded(self._coded_vectors(packed)) + self.fit.mean_HD[:, None]

    @property
    def coded_groups(self) -> tuple[ChannelGroup, ...]:
        """Those with bits."""
        return self._groups

    def query_in_coded(self, query_BHGD: Tensor) -> Tensor:
        """float32 [B, H, G, C]: its product with a coded vector is the query's with the decoded,
        but for the product with the mean."""
        if self.fit.inverse_HDD is None:
            return query_BHGD[..., : self._coded]
        return query_BHGD @ self.fit.inverse_HDD[..., : self._coded]

    def from_coded(self, coded_BHGC: Tensor) -> Tensor:
        """What sums of coded vectors decode to, float32 [B, H, G, D], without means."""
        if self.fit.inverse_HDD is None:
            return pad(coded_BHGC, (0, self.head_dim - self._coded))
        return coded_BHGC @ self.fit.inverse_HDD[..., : self._coded].mT

    def _scale(self, packed: PackedVectors) -> Tensor:
        return packed.scalars.float() / math.sqrt(self._coded)

    def _coded_vectors(self, packed: PackedVectors) -> Tensor:
        widths = [packed_bytes(group.channels, group.bits) for group in self._groups]
        planes = packed.indices.split(widths, dim=-1)
        indices = [unpack(p, g.bits, g.channels) for p, g in zip(planes, self._groups, strict=True)]
        parts = [self._look_up(i.int(), g.bits) for i, g in zip(indices, self._groups, strict=True)]
        return torch.cat(parts, dim=-1) * self._scale(packed)[..., None]

    @cached_property
    def cpu_tables(self) -> "CpuTables":
        """What the compiled loops read."""
        from stillhouse.kernels.turboquant.cpu_codec import CpuTables

        fit = self.fit
        books = [(self._centroids[g.bits], self._boundaries[g.bits]) for g in self._groups]
        return CpuTables.build(
            fit.map_HDD, fit.mean_HD, fit.weight_HD, self._groups, books, self.scalar
        )

    def _unit(self, centred_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """The coded channels scaled to variance 1, [B, H, T, C], and their norm before."""
        if self.fit.map_HDD is None:
            coded_BHTC = centred_BHTD[..., : self._coded]
        else:
            coded_BHTC = centred_BHTD @ self.fit.map_HDD[:, : self._coded].mT
        norm_BHT = torch.linalg.vector_norm(coded_BHTC, dim=-1)
        to_unit_BHT = torch.where(norm_BHT > 0, math.sqrt(self._coded) / norm_BHT, 0.0)
        return coded_BHTC * to_unit_BHT[..., None], norm_BHT

    def _split(self, x_BHTC: Tensor) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = x_BHTC.split([g.channels for g in self._groups], dim=-1)
        return parts

    def _look_up(self, index: Tensor, bits: int) -> Tensor:
        return self._centroids[bits].index_select(0, index.reshape(-1)).view(index.shape)

    def _factor(self, unit_BHTC: Tensor, centroid_BHTC: Tensor) -> Tensor:
        """What the norm is multiplied by, [B, H, T]."""
        weight_HC = self.fit.weight_HD[:, None, : self._coded]
        inner = (weight_HC * unit_BHTC * centroid_BHTC).sum(-1)
        if self.scalar == "unbiased":
            return (weight_HC * unit_BHTC.square()).sum(-1) / inner.clamp_min(_TINY)
        length: Tensor = (weight_HC * centroid_BHTC.square()).sum(-1)
        return inner / length
