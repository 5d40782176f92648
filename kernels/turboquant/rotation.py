"""The random rotation R = H · diag(s): random signs, then a normalised Walsh–Hadamard transform.

TurboQuant (arXiv:2504.19874, Algorithm 1, line 2) asks for a random rotation; this is the usual
structured one. The signs come BEFORE the Hadamard: without them a vector with a constant offset
lands in one coordinate, where a codebook for Gaussian coordinates clips it.

A head size that is not a power of two (80, 96, 192) gets a block-diagonal Hadamard whose blocks
have the size of its largest power-of-two divisor (16, 32, 64).

Shape suffixes: D head size, B block size, ... any leading axes.
"""

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor


def hadamard_block(dim: int) -> int:
    """The Hadamard block of a head size: its largest power-of-two divisor.

    Raises ValueError below 8, where too few coordinates are mixed (and bit planes do not fill
    bytes): choose a head size that is a multiple of 8.
    """
    block = dim & -dim
    if dim <= 0 or block < 8:
        raise ValueError(f"expected a head size that is a positive multiple of 8, found {dim}")
    return block


def random_signs(dim: int, seed: int) -> Tensor:
    """s: float32 [D] of ±1 on the CPU, the same on every platform and torch version for a seed."""
    # Python fixes the stream of random() for good; torch does not promise that of its generators.
    stream = random.Random(seed)
    signs = [1.0 if stream.random() < 0.5 else -1.0 for _ in range(dim)]
    return torch.tensor(signs, dtype=torch.float32, device="cpu")


def hadamard_transform(x_D: Tensor, block: int) -> Tensor:
    """Multiply each block of the last axis by the normalised Sylvester–Hadamard matrix.

    The fast butterfly: log2(block) passes over x [..., D]; dtype and shape stay. The matrix is
    symmetric and orthogonal, so the transform is its own inverse. ValueError when `block` is not
    a power of two that divides D.
    """
    dim = x_D.shape[-1]
    if block <= 0 or block & (block - 1) or dim % block:
        raise ValueError(f"expected a power-of-two block that divides {dim}, found {block}")
    y = x_D
    half = 1
    while half < block:
        y = y.reshape(-1, 2, half)
        y = torch.stack((y[:, 0] + y[:, 1], y[:, 0] - y[:, 1]), dim=1)
        half *= 2
    return y.reshape(x_D.shape) * (1 / math.sqrt(block))


@dataclass(frozen=True, slots=True)
class Rotation:
    """R = H · diag(s) for one head size, with its tables on one device.

    signs: float32 [D]. matrix: float32 [D, D], R itself (y = R x). For the head sizes in use
    one small matrix product is several times faster than the butterfly's passes in PyTorch.
    """

    block: int
    signs: Tensor
    matrix: Tensor

    @classmethod
    def seeded(cls, dim: int, seed: int, device: torch.device | str = "cpu") -> "Rotation":
        """The rotation of a head size (multiple of 8, else ValueError) and a seed."""
        return cls._of_signs(random_signs(dim, seed).to(device))

    @classmethod
    def without_signs(cls, dim: int, device: torch.device | str = "cpu") -> "Rotation":
        """H alone, which others use: a constant offset of all coordinates lands in one."""
        return cls._of_signs(torch.ones(dim, dtype=torch.float32, device=device))

    @classmethod
    def _of_signs(cls, signs_D: Tensor) -> "Rotation":
        dim, device = signs_D.shape[0], signs_D.device
        block = hadamard_block(dim)
        identity_DD = torch.eye(dim, dtype=torch.float32, device=device)
        # Row j of the transformed diag(s) is H (s_j e_j), column j of R: the loops on a CPU read
        # columns, so it stays a view.
        matrix_DD = hadamard_transform(identity_DD * signs_D, block).T
        return cls(block, signs_D, matrix_DD)

    def rotate(self, x_D: Tensor) -> Tensor:
        """R x for every float32 vector x of [..., D]."""
        return x_D @ self.matrix.T

    def rotate_back(self, y_D: Tensor) -> Tensor:
        """R^T y, the inverse, for every float32 vector y of [..., D]."""
        return y_D @ self.matrix

    def rotate_fast(self, x_D: Tensor) -> Tensor:
        """R x by the butterfly, in the dtype of x."""
        return hadamard_transform(x_D * self.signs.to(x_D.dtype), self.block)

    def rotate_back_fast(self, y_D: Tensor) -> Tensor:
        """R^T y by the butterfly, in the dtype of y."""
        return hadamard_transform(y_D, self.block) * self.signs.to(y_D.dtype)
