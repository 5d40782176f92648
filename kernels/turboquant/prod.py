"""The prod codec of TurboQuant (arXiv:2504.19874, Algorithm 2): inner products without bias.

Encode: x̂ by the mse codec with one bit less, r = x - x̂, keep sign(S r) and ‖r‖. Decode:
x̂ + scale · ‖r‖ · S^T sign(S r). Over the draw of a Gaussian S, ⟨q, decoded⟩ has the mean ⟨q, x⟩
and the variance (π/2 ‖q‖² ‖r‖² - ⟨q, r⟩²) / D.

Shape suffixes: D head size, P packed bytes, ... any leading axes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.kernels.turboquant.codec import MseCodec, PackedVectors
from stillhouse.kernels.turboquant.packing import pack, unpack
from stillhouse.kernels.turboquant.precision import in_float32
from stillhouse.kernels.turboquant.sketch import Sketch, SketchKind

PROD_BITS = (2, 3, 4, 5)


@dataclass(frozen=True, slots=True)
class ProdVectors:
    """Encoded vectors: `coarse` of the mse codec; `residual` holds signs and residual norms."""

    coarse: PackedVectors
    residual: PackedVectors

    @property
    def nbytes(self) -> int:
        """Bytes of the storage behind all four tensors."""
        return self.coarse.nbytes + self.residual.nbytes

    def require_finite(self) -> None:
        """NotFiniteError when a vector could not be stored; makes the host wait for the device."""
        self.coarse.require_finite()
        self.residual.require_finite()


class ProdCodec:
    """One instance a head size; its tables lie on one device.

    head_dim: D, a multiple of 8. bits: 2…5, all in but for two float16 scalars a vector. sketch:
    `gaussian` (the paper's) or `orthogonal`. seed: of the rotation and of the sketch. ValueError
    for others.
    """

    def __init__(
        self,
        head_dim: int,
        bits: int,
        sketch: SketchKind = "gaussian",
        seed: int = 0,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        if bits not in PROD_BITS:
            raise ValueError(f"expected bits in {PROD_BITS}, found {bits!r}; choose one of these")
        self.head_dim, self.bits = head_dim, bits
        self.mse = MseCodec(head_dim, bits - 1, "norm", seed, device=device)
        self.sketch = Sketch.seeded(head_dim, sketch, seed, device)

    @property
    def bytes_per_vector(self) -> int:
        """Bytes stored for one vector: indices, signs and both float16 scalars."""
        return self.mse.bytes_per_vector + self.head_dim // 8 + 2

    @property
    def nbytes(self) -> int:
        """Bytes of the codec's tables: those of the mse codec and the sketch."""
        return self.mse.nbytes + self.sketch.matrix.untyped_storage().nbytes()

    @in_float32
    def encode(self, x_D: Tensor) -> ProdVectors:
        """float32/float16/bfloat16 [..., D] → packed vectors; raises as `MseCodec.encode`."""
        coarse = self.mse.encode(x_D)
        residual_D = x_D.detach().float() - self.mse.decode(coarse)
        norm = torch.linalg.vector_norm(residual_D, dim=-1)
        signs = pack(self.sketch.signs(residual_D), 1)
        return ProdVectors(coarse, PackedVectors(signs, norm.half()))

    @in_float32
    def decode(self, packed: ProdVectors, dtype: torch.dtype = torch.float32) -> Tensor:
        """Packed vectors → `dtype` [..., D]; float32 arithmetic, rounded once at the end."""
        signs_D = unpack(packed.residual.indices, 1, self.head_dim)
        norm = packed.residual.scalars.float()[..., None]
        return (self.mse.decode(packed.coarse) + norm * self.sketch.direction(signs_D)).to(dtype)
