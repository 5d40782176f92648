"""Symmetric laws of variance 1, in float64: of a rotated vector's coordinates and its angles."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

_NODES = 64  # of Gauss and Legendre: the integrands are entire, so this reaches rounding
_REACH = 12.0  # standard deviations past which a tail adds less than 1e-30 of itself


@dataclass(frozen=True, slots=True)
class Law:
    """density: f(x). tail: P(X > x) for x >= 0. tail_sum: E[X; X > x]. end: the largest value."""

    density: Callable[[float], float]
    tail: Callable[[float], float]
    tail_sum: Callable[[float], float]
    end: float


@cache
def gaussian_law() -> Law:
    """N(0, 1)."""

    def density(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    def tail(x: float) -> float:
        return math.erfc(x / math.sqrt(2)) / 2

    return Law(density, tail, density, math.inf)


@cache
def sphere_law(dim: int) -> Law:
    """√d u_1, u uniform on the unit sphere of d = `dim` dimensions: density ∝ (1 - x²/d)^((d-3)/2).

    TurboQuant, Lemma 1. ValueError below 3 dimensions.
    """
    if dim < 3:
        raise ValueError(f"expected at least 3 dimensions, found {dim}")
    log_peak = math.lgamma(dim / 2) - math.lgamma((dim - 1) / 2) - math.log(math.pi) / 2
    peak, end = math.exp(log_peak), math.sqrt(dim)
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)

    def power(x: float, exponent: float) -> float:
        """(1 - x²/d)^exponent; by log1p, which keeps its digits where d is large."""
        share = min(1.0, x * x / dim)
        return math.exp(exponent * math.log1p(-share)) if share < 1 else float(exponent == 0)

    def density(x: float) -> float:
        return peak / end * power(x, (dim - 3) / 2)

    def tail(x: float) -> float:
        # x = √d sin θ makes the integrand cos^(d-2) θ, smooth also at the end.
        if x >= end:
            return 0.0
        low = math.asin(x / end)
        high = min(math.pi / 2, low + _REACH / end)
        theta = (high - low) / 2 * nodes + (high + low) / 2
        log_cosine = np.log1p(-2 * np.sin(theta / 2) ** 2)
        return float(peak * (high - low) / 2 * (weights @ np.exp((dim - 2) * log_cosine)))

    def tail_sum(x: float) -> float:
        return peak * end / (dim - 1) * power(x, (dim - 1) / 2)

    return Law(density, tail, tail_sum, end)


@dataclass(frozen=True, slots=True)
class AngleLaw:
    """ψ = π/4 + deviation · X, X of `law`, which is symmetric with variance 1."""

    law: Law
    deviation: float


@cache
def angle_law(level: int) -> AngleLaw:
    """That of PolarQuant (arXiv:2502.02617, Lemma 2) at level l >= 2, of radii (r cos ψ, r sin ψ).

    Each is the norm of 2^(l-1) Gaussian coordinates, so the density is ∝ sin^k(2ψ) on [0, π/2],
    k = 2^(l-1) - 1; here that of φ = ψ - π/4, ∝ cos^k(2φ). ValueError for other levels.
    """
    if level < 2:
        raise ValueError(f"expected a level of 2 or more, found {level}")
    power, edge = 2 ** (level - 1) - 1, math.pi / 4
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)

    def integral(low: float, moment: int) -> float:
        """∫ φ^moment cos^k(2φ) dφ from `low` to π/4."""
        if low >= edge:
            return 0.0
        phi = (edge - low) / 2 * nodes + (edge + low) / 2
        return float((edge - low) / 2 * (weights @ (phi**moment * np.cos(2 * phi) ** power)))

    mass = 2 * integral(0.0, 0)
    deviation = math.sqrt(2 * integral(0.0, 2) / mass)

    def density(x: float) -> float:
        return deviation * float(math.cos(2 * min(deviation * x, edge)) ** power) / mass

    def tail(x: float) -> float:
        return integral(deviation * x, 0) / mass

    def tail_sum(x: float) -> float:
        return integral(deviation * x, 1) / mass / deviation

    return AngleLaw(Law(density, tail, tail_sum, edge / deviation), deviation)
