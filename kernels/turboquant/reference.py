"""TurboQuant's Algorithm 1 (arXiv:2504.19874) in float64, written for reading, not for speed.

Nothing is shared with the fast code: the codebook comes from plain Lloyd iterations, the rotation
is a dense matrix, rounding is a search over all centroids, and nothing is packed.

Shape suffixes: D head size, N vectors, K centroids.
"""

import math

import torch
from torch import Tensor

_DENSITY = 1 / math.sqrt(2 * math.pi)


def lloyd_max_reference(bits: int, steps: int = 5000) -> Tensor:
    """float64 [2^bits]: centroids of N(0, 1) by `steps` plain Lloyd iterations (bits ≤ 5)."""
    centroid_K = torch.linspace(-2, 2, 2**bits, dtype=torch.float64, device="cpu")
    infinity = torch.tensor([math.inf], dtype=torch.float64, device="cpu")
    for _ in range(steps):
        middle = (centroid_K[1:] + centroid_K[:-1]) / 2
        edges = torch.cat((-infinity, middle, infinity))
        mass_K = torch.special.ndtr(edges).diff()
        centroid_K = -(_DENSITY * torch.exp(-edges.square() / 2)).diff() / mass_K
    return centroid_K


def hadamard_matrix(size: int) -> Tensor:
    """float64 [size, size]: the normalised Sylvester–Hadamard matrix of a power of two."""
    factor = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64, device="cpu") / math.sqrt(2)
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while matrix.shape[0] < size:
        matrix = torch.kron(factor, matrix)
    return matrix


def signed_hadamard(signs_D: Tensor, block: int) -> Tensor:
    """float64 [D, D]: R = blockdiag(H, …, H) · diag(s)."""
    blocks = torch.eye(signs_D.numel() // block, dtype=torch.float64, device="cpu")
    return torch.kron(blocks, hadamard_matrix(block)) * signs_D.double()


def haar_rotation(dim: int, seed: int) -> Tensor:
    """float64 [D, D]: a rotation of the Haar law, QR of a Gaussian with signs fixed by diag(R)."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    gaussian = torch.randn(dim, dim, dtype=torch.float64, device="cpu", generator=generator)
    factors = torch.linalg.qr(gaussian)
    rotation: Tensor = factors.Q * factors.R.diagonal().sign()
    return rotation


def reconstruct(x_ND: Tensor, rotation_DD: Tensor, centroid_K: Tensor, scalar: str) -> Tensor:
    """float64 [N, D]: each non-zero vector after encoding and decoding, with an exact scalar.

    scalar: `norm`, `corrected`, `unbiased` or `least_squares`, as `MseCodec`.
    """
    x_ND = x_ND.double()
    norm = torch.linalg.vector_norm(x_ND, dim=1, keepdim=True)
    y_ND = (x_ND @ rotation_DD.T) / norm
    scaled_K = centroid_K / math.sqrt(x_ND.shape[1])
    nearest = (y_ND[:, :, None] - scaled_K).abs().argmin(dim=-1)
    c_ND = scaled_K[nearest]
    inner = (y_ND * c_ND).sum(dim=1, keepdim=True)
    length = torch.linalg.vector_norm(c_ND, dim=1, keepdim=True)
    factors: dict[str, Tensor] = {
        "norm": norm,
        "corrected": norm / length,
        "unbiased": norm / inner,
        "least_squares": norm * inner / length**2,
    }
    return factors[scalar] * (c_ND @ rotation_DD)
