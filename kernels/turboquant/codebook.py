"""Lloyd–Max codebooks for N(0, 1), solved in float64 from closed-form Gaussian integrals.

TurboQuant (arXiv:2504.19874, §3.1, eq. 4): a coordinate of a rotated unit vector is nearly
N(0, 1/d), so its best scalar quantiser is the Lloyd–Max quantiser of N(0, 1) divided by √d.

The tables are plain Python floats, so they depend on no default dtype, device or inference mode.
"""

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

SUPPORTED_BITS = (1, 2, 3, 4, 5, 8)

_LLOYD_STEPS = 30  # enough to enter the basin of Newton's method from the Panter–Dite start
_NEWTON_STEPS = 60
_TOLERANCE = 1e-9  # of the last step; Newton squares it, and at 8 bits rounding is about 1e-10


@dataclass(frozen=True, slots=True)
class Codebook:
    """The Lloyd–Max quantiser of N(0, 1) with 2^bits levels.

    centroids: 2^bits ascending values, antisymmetric about 0 (none is 0).
    boundaries: the 2^bits - 1 midpoints between neighbours.
    distortion: E[(x - c(x))²] for x ~ N(0, 1), the relative mean squared error D(bits).
    """

    bits: int
    centroids: tuple[float, ...]
    boundaries: tuple[float, ...]
    distortion: float


@cache
def gaussian_codebook(bits: int) -> Codebook:
    """The codebook for `bits` in SUPPORTED_BITS; ValueError for any other number."""
    if bits not in SUPPORTED_BITS:
        raise ValueError(f"expected bits in {SUPPORTED_BITS}, found {bits!r}; choose one of these")
    half = _solve_positive_half(2 ** (bits - 1))
    centroids = tuple(-c for c in reversed(half)) + half
    boundaries = tuple((a + b) / 2 for a, b in pairwise(centroids))
    # With centroids at the cell means, E[(x - c)²] = E[x²] - E[c²].
    distortion = 1 - 2 * sum(p * c * c for p, c in zip(_masses(half), half, strict=True))
    return Codebook(bits, centroids, boundaries, distortion)


def distortion(bits: int) -> float:
    """D(bits), the relative mean squared error of the codebook on Gaussian coordinates."""
    return gaussian_codebook(bits).distortion


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _tail(x: float) -> float:
    # P(X > x). The difference of two tails keeps its digits far out, that of two cdfs does not.
    return math.erfc(x / math.sqrt(2)) / 2


def _edges(half: tuple[float, ...]) -> list[float]:
    """Cell edges of the positive half: 0, the midpoints, infinity."""
    return [0.0, *((a + b) / 2 for a, b in pairwise(half)), math.inf]


def _masses(half: tuple[float, ...]) -> list[float]:
    edges = _edges(half)
    return [_tail(a) - _tail(b) for a, b in pairwise(edges)]


def _cell_means(half: tuple[float, ...]) -> list[float]:
    edges = _edges(half)
    cells = zip(edges, edges[1:], _masses(half), strict=False)
    return [(_density(a) - _density(b)) / mass for a, b, mass in cells]


def _panter_dite_start(levels: int) -> tuple[float, ...]:
    # The optimal high-rate point density is ∝ density^(1/3), that is N(0, 3): take its quantiles.
    quantiles = ((0.5 + (i + 0.5) / (2 * levels)) for i in range(levels))
    return tuple(math.sqrt(3) * _normal_quantile(q) for q in quantiles)


def _normal_quantile(q: float) -> float:
    low, high = 0.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _tail(middle) > 1 - q else (low, middle)
    return low


def _solve_positive_half(levels: int) -> tuple[float, ...]:
    """Positive centroids c with c = cell_means(c): Lloyd steps, then Newton.

    Lloyd alone converges linearly, with hundreds of thousands of steps at 8 bits. The fixed point
    is unique because the Gaussian density is log-concave (Fleischer, 1964).
    """
    half = _panter_dite_start(levels)
    for _ in range(_LLOYD_STEPS):
        half = tuple(_cell_means(half))
    for _ in range(_NEWTON_STEPS):
        step = _newton_step(half)
        half = tuple(c + s for c, s in zip(half, step, strict=True))
        if max(abs(s) for s in step) < _TOLERANCE:
            return half
    raise ArithmeticError(f"Lloyd–Max did not converge for {2 * levels} levels; report this")


def _newton_step(half: tuple[float, ...]) -> list[float]:
    """Solve (I - J) s = cell_means(c) - c, where J, the Jacobian of the means, is tridiagonal."""
    means, masses, edges = _cell_means(half), _masses(half), _edges(half)
    lower, diagonal, upper = [], [], []
    for i, (mean, mass) in enumerate(zip(means, masses, strict=True)):
        left, right = edges[i], edges[i + 1]
        # d mean / d edge, times 1/2 because an edge is the midpoint of two centroids.
        by_left = _density(left) * (mean - left) / mass / 2 if i else 0.0  # the edge 0 is fixed
        by_right = _density(right) * (right - mean) / mass / 2 if right < math.inf else 0.0
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
