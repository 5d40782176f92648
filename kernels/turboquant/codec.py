"""The mse codec of TurboQuant (arXiv:2504.19874, Algorithm 1) with one stored scalar a vector.

Encode: n = ‖x‖, y = R x / n, each y_j to the nearest Lloyd–Max centroid; keep the packed indices
and one float16 scalar. Decode: scalar · R^T c. `unbiased` is the EDEN scale (arXiv:2604.18555).

What is not finite: a vector with a NaN or an infinity, or whose scalar exceeds float16 (65,504),
cannot be stored. Clamping would change numbers silently, so it is refused: ValueError on the CPU,
where looking costs 1/D of the work. On other devices looking would make the host wait at every
step, so the scalar is stored non-finite and the vector decodes to NaN, as a NaN in a 16-bit cache
would; call `PackedVectors.require_finite` where the host waits anyway. Norms below 2^-25 store
the scalar 0 and decode to zeros, so the error of a tiny vector is below 2^-24 whatever its size.

Shape suffixes: D head size, P packed bytes, ... any leading axes.
"""

import importlib.util
import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from stillhouse.kernels.turboquant.balance import ChannelGroup
from stillhouse.kernels.turboquant.codebook import gaussian_codebook, sphere_codebook
from stillhouse.kernels.turboquant.inputs import require_vectors
from stillhouse.kernels.turboquant.packing import pack, packed_bytes, unpack
from stillhouse.kernels.turboquant.precision import in_float32
from stillhouse.kernels.turboquant.rotation import Rotation

if TYPE_CHECKING:
    from stillhouse.kernels.turboquant.cpu_codec import CpuTables
    from stillhouse.kernels.turboquant.triton_codec import TritonTables

ScalarKind = Literal["norm", "corrected", "unbiased", "least_squares"]
SCALAR_KINDS: tuple[ScalarKind, ...] = get_args(ScalarKind)
CoordinateLaw = Literal["gaussian", "sphere"]
COORDINATE_LAWS: tuple[CoordinateLaw, ...] = get_args(CoordinateLaw)

_TINY = 1e-20  # guards 0/0 for the zero vector; ⟨y, c⟩ of any other vector is above 1e-5


@cache
def has_triton() -> bool:
    """Whether triton is installed; it is not imported."""
    return importlib.util.find_spec("triton") is not None


def on_cpu(tensor: Tensor) -> bool:
    """Whether the compiled loops do it."""
    return tensor.device.type == "cpu"


class NotFiniteError(ValueError):
    """A vector is NaN, infinite, or too long for its float16 scalar."""


@dataclass(frozen=True, slots=True)
class PackedVectors:
    """Encoded vectors: `indices` uint8 [..., P] and `scalars` float16 [...] with the same axes."""

    indices: Tensor
    scalars: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the storage behind both tensors, also where they are views of a part of it."""
        storages = (self.indices.untyped_storage(), self.scalars.untyped_storage())
        return sum(storage.nbytes() for storage in storages)

    def require_finite(self) -> None:
        """NotFiniteError when a vector could not be stored; makes the host wait for the device."""
        broken = int(torch.isfinite(self.scalars).logical_not().sum())
        if broken:
            raise NotFiniteError(
                f"expected finite vectors with a norm that float16 holds (65,504), found {broken} "
                f"of {self.scalars.numel()} that are NaN, infinite or larger; keep this layer's "
                "cache in 16 bits, or find the layer that overflows"
            )


class MseCodec:
    """Rotate, round to centroids, pack. One instance a head size; its tables lie on one device.

    head_dim: D, a multiple of 8. bits: 1…5 or 8. scalar: which estimator decodes, at equal bytes:
    `norm` ‖x‖ (the paper's; shrinks inner products by 1 - D(bits)), `corrected` ‖x‖/‖c‖,
    `unbiased` ‖x‖/⟨y, c⟩ (unbiased over the rotation: keys), `least_squares` ‖x‖⟨y, c⟩/‖c‖²
    (least reconstruction error: values). seed: of the rotation's signs. law: the
    codebook's, exactly that of a point of the `sphere` or its `gaussian` limit. rotation: another
    than the seeded one, on `device`. ValueError for others.
    """

    def __init__(
        self,
        head_dim: int,
        bits: int,
        scalar: ScalarKind,
        seed: int = 0,
        *,
        law: CoordinateLaw = "gaussian",
        device: torch.device | str = "cpu",
        rotation: Rotation | None = None,
    ) -> None:
        if scalar not in SCALAR_KINDS:
            raise ValueError(f"expected a scalar in {SCALAR_KINDS}, found {scalar!r}")
        if law not in COORDINATE_LAWS:
            raise ValueError(f"expected a law in {COORDINATE_LAWS}, found {law!r}")
        codebook = gaussian_codebook(bits) if law == "gaussian" else sphere_codebook(bits, head_dim)
        self.head_dim, self.bits, self.scalar, self.seed = head_dim, bits, scalar, seed
        self.law = law
        self.rotation = rotation or Rotation.seeded(head_dim, seed, device)
        # Explicit dtypes: a serving engine builds models under a bfloat16 default dtype.
        self._centroids = torch.tensor(codebook.centroids, dtype=torch.float32, device=device)
        self._boundaries = torch.tensor(codebook.boundaries, dtype=torch.float32, device=device)

    @property
    def bytes_per_vector(self) -> int:
        """Bytes stored for one vector: packed indices and the float16 scalar."""
        return packed_bytes(self.head_dim, self.bits) + 2

    @property
    def nbytes(self) -> int:
        """Bytes of the codec's tables: rotation, codebook, what the compiled loops read beside."""
        tables = (
            self.rotation.signs,
            self.rotation.matrix,
            self._centroids,
            self._boundaries,
        )
        own = sum(table.untyped_storage().nbytes() for table in tables)
        own += self._triton_tables.nbytes if "_triton_tables" in self.__dict__ else 0
        return own + (self.cpu_tables.bytes_apart(tables) if "cpu_tables" in self.__dict__ else 0)

    @in_float32
    def encode(self, x_D: Tensor) -> PackedVectors:
        """float32/float16/bfloat16 [..., D] → packed vectors; the arithmetic is float32.

        ValueError for another dtype or last axis, and on the CPU for vectors that are not finite
        or exceed float16 (see the module's text for other devices).
        """
        require_vectors(x_D, self.head_dim)
        if self._on_triton(x_D):
            from stillhouse.kernels.turboquant import triton_codec

            return PackedVectors(*triton_codec.encode(x_D, self._triton_tables, self.scalar))
        return self.cpu_tables.encode(x_D) if on_cpu(x_D) else self.encode_reference(x_D)

    def encode_reference(self, x_D: Tensor) -> PackedVectors:
        """As `encode` on any device, by PyTorch; refuses nothing."""
        x_D = x_D.detach().float()
        norm = torch.linalg.vector_norm(x_D, dim=-1)
        # √D y: the codebook is that of N(0, 1). The zero vector stays zero.
        to_unit = torch.where(norm > 0, math.sqrt(self.head_dim) / norm, 0.0)
        unit_D = self.rotation.rotate(x_D) * to_unit[..., None]
        index_D = torch.bucketize(unit_D, self._boundaries, out_int32=True)
        scalars = self._stored_scalar(norm, unit_D, self._look_up(index_D))
        return PackedVectors(pack(index_D.to(torch.uint8), self.bits), scalars.half())

    @in_float32
    def decode(self, packed: PackedVectors, dtype: torch.dtype = torch.float32) -> Tensor:
        """Packed vectors → `dtype` [..., D]; float32 arithmetic, rounded once at the end."""
        if self._on_triton(packed.scalars):
            from stillhouse.kernels.turboquant import triton_codec

            tables = self._triton_tables
            return triton_codec.decode(packed.indices, packed.scalars, tables, dtype)
        scale = packed.scalars.float() / math.sqrt(self.head_dim)
        if on_cpu(packed.scalars):
            rotated_D = self.cpu_tables.decode(packed.indices, scale)
            return self.rotation.rotate_back(rotated_D).to(dtype)
        return self.rotation.rotate_back(self._rotated(packed, scale)).to(dtype)

    def decode_reference(self, packed: PackedVectors) -> Tensor:
        """As `decode` to float32 on any device, by PyTorch."""
        scale = packed.scalars.float() / math.sqrt(self.head_dim)
        return self.rotation.rotate_back(self._rotated(packed, scale))

    def _rotated(self, packed: PackedVectors, scale: Tensor) -> Tensor:
        index_D = unpack(packed.indices, self.bits, self.head_dim)
        return self._look_up(index_D.int()) * scale[..., None]

    @cached_property
    def cpu_tables(self) -> "CpuTables":
        """What the compiled loops read."""
        from stillhouse.kernels.turboquant.cpu_codec import CpuTables

        row_D = torch.ones(1, self.head_dim)
        return CpuTables.build(
            self.rotation.matrix[None],
            torch.zeros_like(row_D),
            row_D,
            (ChannelGroup(self.head_dim, self.bits),),
            ((self._centroids, self._boundaries),),
            self.scalar,
        )

    @property
    def coded_groups(self) -> tuple[ChannelGroup, ...]:
        """All channels, alike."""
        return (ChannelGroup(self.head_dim, self.bits),)

    def query_in_coded(self, query_BHGD: Tensor) -> Tensor:
        """float32 [B, H, G, D]: its product with a coded vector is the query's with the decoded."""
        return self.rotation.rotate(query_BHGD)

    def from_coded(self, coded_BHGD: Tensor) -> Tensor:
        """What sums of coded vectors decode to, float32 [B, H, G, D]."""
        return self.rotation.rotate_back(coded_BHGD)

    def _on_triton(self, tensor: Tensor) -> bool:
        """Whether the Triton kernels do it: on CUDA, for the bits and head sizes they have."""
        return tensor.is_cuda and self.bits <= 5 and self.head_dim <= 256 and has_triton()

    @cached_property
    def _triton_tables(self) -> "TritonTables":
        from stillhouse.kernels.turboquant.triton_codec import TritonTables

        matrix, boundaries, centroids = self.rotation.matrix, self._boundaries, self._centroids
        return TritonTables.build(matrix, boundaries, centroids, self.bits)

    def _look_up(self, index_D: Tensor) -> Tensor:
        return self._centroids.index_select(0, index_D.reshape(-1)).view(index_D.shape)

    def _stored_scalar(self, norm: Tensor, unit_D: Tensor, centroid_D: Tensor) -> Tensor:
        """The scalar of each vector, float32 [...]; unit_D = √D y and centroid_D = √D c."""
        if self.scalar == "norm":
            return norm
        if self.scalar == "corrected":
            length = torch.linalg.vector_norm(centroid_D, dim=-1) / math.sqrt(self.head_dim)
            corrected: Tensor = norm / length
            return corrected
        inner = (unit_D * centroid_D).mean(dim=-1)
        if self.scalar == "unbiased":
            return norm / inner.clamp_min(_TINY)
        return norm * inner / centroid_D.square().mean(dim=-1)
