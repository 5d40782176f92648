"""Symmetric laws of variance 1 that a coordinate of a rotated vector may have, in float64."""

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
