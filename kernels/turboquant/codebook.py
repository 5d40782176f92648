"""Lloyd–Max codebooks for the coordinates of a rotated vector, solved in float64.

TurboQuant (arXiv:2504.19874, §3.1, eq. 4): a coordinate of a rotated unit vector has the law of one
of a uniform point of the sphere (a scaled Beta), nearly N(0, 1/d); its best scalar quantiser is the
Lloyd–Max quantiser of that law. Both are here, times √d, so that their variance is 1.

The tables are plain Python floats, so they depend on no default dtype, device or inference mode.
"""

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from statistics import NormalDist

from stillhouse.kernels.turboquant.laws import Law, gaussian_law, sphere_law

SUPPORTED_BITS = (1, 2, 3, 4, 5, 8)

_LLOYD_STEPS = 30  # enough to enter the basin of Newton's method from the Panter–Dite start
_NEWTON_STEPS = 60
_TOLERANCE = 1e-9  # of the last step; Newton squares it, and at 8 bits rounding is about 1e-10


@dataclass(frozen=True, slots=True)
class Codebook:
    """The Lloyd–Max quantiser, with 2^bits levels, of a law with mean 0 and variance 1.

    centroids: 2^bits ascending values, antisymmetric about 0 (none is 0).
    boundaries: the 2^bits - 1 midpoints between neighbours.
    distortion: E[(x - c(x))²] for x of that law, the relative mean squared error D(bits).
    """

    bits: int
    centroids: tuple[float, ...]
    boundaries: tuple[float, ...]
    distortion: float


@cache
def gaussian_codebook(bits: int) -> Codebook:
    """That of N(0, 1), for `bits` in SUPPORTED_BITS; ValueError for any other number."""
    return lloyd_max_codebook(bits, gaussian_law())


@cache
def sphere_codebook(bits: int, dim: int) -> Codebook:
    """That of √d u_1, u uniform on the unit sphere of `dim` dimensions.

    ValueError for bits outside SUPPORTED_BITS and below 3 dimensions, where the density has its
    peaks at the ends and the quantiser is not unique.
    """
    return lloyd_max_codebook(bits, sphere_law(dim))


def lloyd_max_codebook(bits: int, law: Law) -> Codebook:
    """That of any law with a log-concave density; ValueError for bits outside SUPPORTED_BITS."""
    if bits not in SUPPORTED_BITS:
        raise ValueError(f"expected bits in {SUPPORTED_BITS}, found {bits!r}; choose one of these")
    half = _solve_positive_half(2 ** (bits - 1), law)
    centroids = tuple(-c for c in reversed(half)) + half
    boundaries = tuple((a + b) / 2 for a, b in pairwise(centroids))
    # With centroids at the cell means, E[(x - c)²] = E[x²] - E[c²].
    distortion = 1 - 2 * sum(p * c * c for p, c in zip(_masses(half, law), half, strict=True))
    return Codebook(bits, centroids, boundaries, distortion)


def distortion(bits: int) -> float:
    """D(bits), the relative mean squared error of the codebook on Gaussian coordinates."""
    return gaussian_codebook(bits).distortion


def _edges(half: tuple[float, ...], law: Law) -> list[float]:
    """Cell edges of the positive half: 0, the midpoints, the law's end."""
    return [0.0, *((a + b) / 2 for a, b in pairwise(half)), law.end]


def _masses(half: tuple[float, ...], law: Law) -> list[float]:
    # The difference of two tails keeps its digits far out, that of two cdfs does not.
    return [a - b for a, b in pairwise(map(law.tail, _edges(half, law)))]


def _cell_means(half: tuple[float, ...], law: Law) -> list[float]:
    sums = (a - b for a, b in pairwise(map(law.tail_sum, _edges(half, law))))
    return [total / mass for total, mass in zip(sums, _masses(half, law), strict=True)]


def _start(levels: int, law: Law) -> tuple[float, ...]:
    """Quantiles of the best point density at a high rate (Panter–Dite), drawn inside the law's end.

    For a Gaussian it is ∝ density^(1/3), that is N(0, 3).
    """
    wide = NormalDist(0, math.sqrt(3))
    quantiles = (wide.inv_cdf(0.5 + (i + 0.5) / (2 * levels)) for i in range(levels))
    if math.isinf(law.end):
        return tuple(quantiles)
    return tuple(law.end * math.tanh(x / law.end) for x in quantiles)


def _solve_positive_half(levels: int, law: Law) -> tuple[float, ...]:
    """Positive centroids c with c = cell_means(c): Lloyd steps, then Newton.

    Lloyd alone converges linearly, with hundreds of thousands of steps at 8 bits. The fixed point
    is unique because the density is log-concave (Fleischer, 1964).
    """
    half = _start(levels, law)
    for _ in range(_LLOYD_STEPS):
        half = tuple(_cell_means(half, law))
    for _ in range(_NEWTON_STEPS):
        step = _newton_step(half, law)
        half = tuple(c + s for c, s in zip(half, step, strict=True))
        if max(abs(s) for s in step) < _TOLERANCE:
            return half
    raise ArithmeticError(f"Lloyd–Max did not converge for {2 * levels} levels; report this")


def _newton_step(half: tuple[float, ...], law: Law) -> list[float]:
    """Solve (I - J) s = cell_means(c) - c, where J, the Jacobian of the means, is tridiagonal."""
    means, masses, edges = _cell_means(half, law), _masses(half, law), _edges(half, law)
    lower, diagonal, upper = [], [], []
    last = len(half) - 1
    for i, (mean, mass) in enumerate(zip(means, masses, strict=True)):
        left, right = edges[i], edges[i + 1]
        # d mean / d edge, times 1/2 because an edge is the midpoint of two centroids; the first
        # edge and the last stay where they are.
        by_left = law.density(left) * (mean - left) / mass / 2 if i else 0.0
        by_right = law.density(right) * (right - mean) / mass / 2 if i < last else 0.0
        lower.append(-by_left)
        diagonal.append(1 - by_left - by_right)
        upper.append(-by_right)
    return _solve_tridiagonal(
        lower, diagonal, upper, [m - c for m, c in zip(means, half, strict=True)]
    )


def _solve_tridiagonal(
    lower: list[float], diagonal: list[float], upper: list[float], right: list[float]
) -> list[float]:
    """The Thomas algorithm."""
    diagonal, right = diagonal.copy(), right.copy()
    for i in range(1, len(diagonal)):
        factor = lower[i] / diagonal[i - 1]
        diagonal[i] -= factor * upper[i - 1]
        right[i] -= factor * right[i - 1]
    solution = [right[-1] / diagonal[-1]]
    for i in range(len(diagonal) - 2, -1, -1):
        solution.append((right[i] - upper[i] * solution[-1]) / diagonal[i])
    return solution[::-1]
