"""Random sketches S for the signs of QJL (arXiv:2406.03482): x ↦ sign(S x), one bit a row.

`gaussian`: entries N(0, 1), the paper's. `orthogonal`: a Haar rotation, rows orthonormal, whose
estimate has less variance at the same bytes. `scale` makes scale · ‖x‖ · S^T sign(S x) an unbiased
estimate of x over the draw of S, exactly for either kind.

Shape suffixes: D head size, ... any leading axes.
"""

import math
import random
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, get_args

import torch
from torch import Tensor

SketchKind = Literal["gaussian", "orthogonal"]
SKETCH_KINDS: tuple[SketchKind, ...] = get_args(SketchKind)


@dataclass(frozen=True, slots=True)
class Sketch:
    """S for one head size, on one device. matrix: float32 [D, D]."""

    matrix: Tensor
    scale: float

    @classmethod
    def seeded(
        cls, dim: int, kind: SketchKind, seed: int, device: torch.device | str = "cpu"
    ) -> "Sketch":
        """The sketch of a head size and a seed; ValueError for another kind."""
        if kind not in SKETCH_KINDS:
            raise ValueError(f"expected a sketch in {SKETCH_KINDS}, found {kind!r}")
        if kind == "gaussian":
            # E[s sign(s·x)] = √(2/π) x / ‖x‖ for each of D rows.
            return cls(_gaussian_matrix(dim, seed).float().to(device), math.sqrt(math.pi / 2) / dim)
        haar_DD = haar_matrix(dim, seed)
        return cls(haar_DD.float().to(device), 1 / (dim * mean_coordinate(dim)))

    def signs(self, x_D: Tensor) -> Tensor:
        """uint8 [..., D] for float32 [..., D]: 1 where S x is positive or zero, else 0."""
        return (x_D @ self.matrix.T >= 0).to(torch.uint8)

    def direction(self, signs_D: Tensor) -> Tensor:
        """float32 [..., D]: the estimate of x / ‖x‖ from its signs, as `signs` gives them."""
        return (signs_D.float() * 2 - 1) @ self.matrix * self.scale


def mean_coordinate(dim: int) -> float:
    """E|u_1| = Γ(d/2) / (√π Γ((d+1)/2)) for u uniform on the unit sphere of d dimensions."""
    return math.exp(math.lgamma(dim / 2) - math.lgamma((dim + 1) / 2)) / math.sqrt(math.pi)


def haar_matrix(dim: int, seed: int) -> Tensor:
    """float64 [D, D] on the CPU: a rotation of the Haar law (QR, signs fixed by diag(R))."""
    factors = torch.linalg.qr(_gaussian_matrix(dim, seed))
    rotation: Tensor = factors.Q * factors.R.diagonal().sign()
    return rotation


def _gaussian_matrix(dim: int, seed: int) -> Tensor:
    """float64 [D, D] on the CPU, the same on every platform and torch version for a seed."""
    stream, normal = random.Random(seed), NormalDist()
    # random() may be 0, of which there is no quantile; half a step up changes nothing else.
    values = [normal.inv_cdf(stream.random() + 2.0**-54) for _ in range(dim * dim)]
    return torch.tensor(values, dtype=torch.float64, device="cpu").view(dim, dim)
