"""Coordinates in which a head's channels are sorted by what an error in them costs.

With Σ the covariance of a head's vectors and W the weight of their errors (the cost of an error δ
is δ^T W δ), there is a map A with A Σ A^T = A^-T W A^-1 = diag(s): channel i varies by s_i and its
errors cost s_i (the balanced realisation of Moore, 1981, "Principal component analysis in linear
systems"). Up to a rotation A is the M^(1/2) with M = Σ^-1 # W, the least of
tr(A^-T W A^-1) · tr(A Σ A^T), the cost of one codebook for all channels. Sorted, the channels
may have different bits, which one rotation over all of them would forbid.

Shape suffixes: H heads, D head size.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stillhouse.kernels.turboquant.codebook import distortion

GROUP_BITS = (0, 1, 2, 3, 4, 5)
GroupCount = Literal[1, 3]
_MOST_GROUPS = 3
_SINGLE_BITS, _SINGLE_CHANNELS = (2, 3, 4), range(64, 257, 16)  # what the kernels of a GPU read
_CUTS = 16  # a head is cut at multiples of about D/16: more places gain under 1 % and cost time
_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class BalancedBasis:
    """A: float64 [H, D, D], a row a channel; s: float64 [H, D], positive and descending."""

    map_HDD: Tensor
    spread_HD: Tensor


@dataclass(frozen=True, slots=True)
class ChannelGroup:
    """Consecutive channels (a multiple of 8) of equal bits, 0…5; with 0 they are not stored."""

    channels: int
    bits: int


def balance(covariance_HDD: Tensor, weight_HDD: Tensor, ridge: float = 0.05) -> BalancedBasis:
    """The balanced basis of each head, from symmetric positive semi-definite float64 matrices.

    ridge: share of the mean eigenvalue that is added to every one, so that a direction the samples
    did not show is still stored. A matrix of zeros counts as the identity.
    """
    covariance_HDD = _regularised(covariance_HDD.double(), ridge)
    root_HDD, inverse_HDD = _roots(covariance_HDD)
    product_HDD = root_HDD @ _regularised(weight_HDD.double(), ridge) @ root_HDD
    squares_HD, vectors_HDD = torch.linalg.eigh((product_HDD + product_HDD.mT) / 2)
    spread_HD = squares_HD.flip(-1).clamp_min(_TINY).sqrt()
    map_HDD = spread_HD.sqrt()[..., None] * (vectors_HDD.flip(-1).mT @ inverse_HDD)
    return BalancedBasis(map_HDD, spread_HD)


def _regularised(matrix_HDD: Tensor, ridge: float) -> Tensor:
    mean_H = matrix_HDD.diagonal(dim1=-2, dim2=-1).mean(-1)
    added_H = torch.where(mean_H > 0, ridge * mean_H, 1.0)
    identity = torch.eye(matrix_HDD.shape[-1], dtype=torch.float64, device=matrix_HDD.device)
    return matrix_HDD + added_H[:, None, None] * identity


def _roots(matrix_HDD: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of positive definite matrices, and its inverse."""
    values_HD, vectors_HDD = torch.linalg.eigh(matrix_HDD)
    root_HD = values_HD.clamp_min(_TINY).sqrt()[:, None, :]
    return (vectors_HDD * root_HD) @ vectors_HDD.mT, (vectors_HDD / root_HD) @ vectors_HDD.mT


def expected_cost(spread_HD: Tensor, groups: Sequence[ChannelGroup]) -> float:
    """E[δ^T W δ] of one token, summed over heads, when each group is rotated in itself.

    A rotation makes the group's channels alike in variance and in weight, hence
    D(bits) · (Σ s)² / channels for each group.
    """
    return _cost(_running_sums(spread_HD), groups)


@dataclass(frozen=True, slots=True)
class GroupChoice:
    """Groups, the bits of all channels together, and the expected cost of one token."""

    bits: int
    cost: float
    groups: tuple[ChannelGroup, ...]


def group_curve(spread_HD: Tensor, groups: GroupCount = 3) -> tuple[GroupChoice, ...]:
    """The cheapest groups by bits: the corners of the convex curve, bits rising and cost falling.

    Between two corners a mixture of heads or layers does better than any choice above the line.
    The first has one coded group at least. groups: most of them; 1 is one coded group that the
    kernels of a GPU read (64, 80, … channels of 2 to 4 bits), and what is left out.

    ValueError when D is not a multiple of 8, or for one group not of 64, 80, … 256.
    """
    sums = _running_sums(spread_HD)
    best: dict[int, GroupChoice] = {}
    dim = spread_HD.shape[-1]
    for cut in _single_cuts(dim) if groups == 1 else _cuts(dim):
        bits = sum(group.channels * group.bits for group in cut)
        if not bits:
            continue
        cost = _cost(sums, cut)
        if bits not in best or cost < best[bits].cost:
            best[bits] = GroupChoice(bits, cost, cut)
    corners: list[GroupChoice] = []
    for choice in sorted(best.values(), key=lambda choice: choice.bits):
        while len(corners) > 1 and _gain(corners[-2], corners[-1]) <= _gain(corners[-1], choice):
            corners.pop()
        if not corners or choice.cost < corners[-1].cost:
            corners.append(choice)
    return tuple(corners)


def _gain(cheap: GroupChoice, dear: GroupChoice) -> float:
    """Cost saved by a bit."""
    return (cheap.cost - dear.cost) / (dear.bits - cheap.bits)


def choose_groups(spread_HD: Tensor, bits: float) -> tuple[ChannelGroup, ...]:
    """The cheapest of all cuts into at most three groups with at most `bits` a channel on average.

    All heads share the cut, so that their vectors take the same bytes. ValueError when no cut
    fits (bits below 0) or D is not a multiple of 8.
    """
    dim = spread_HD.shape[-1]
    sums = _running_sums(spread_HD)
    fitting = (
        groups
        for groups in _cuts(dim)
        if sum(group.channels * group.bits for group in groups) <= bits * dim
    )
    best = min(fitting, key=lambda groups: _cost(sums, groups), default=None)
    if best is None:
        raise ValueError(f"expected at least 0 bits a channel, found {bits}")
    return best


def _cuts(dim: int) -> Iterator[tuple[ChannelGroup, ...]]:
    if dim <= 0 or dim % 8:
        raise ValueError(f"expected a head size that is a positive multiple of 8, found {dim}")
    unit = 8 * max(1, round(dim / 8 / _CUTS))
    places = range(unit, dim, unit)
    for count in range(1, _MOST_GROUPS + 1):
        for inner in itertools.combinations(places, count - 1):
            widths = [b - a for a, b in itertools.pairwise((0, *inner, dim))]
            for falling in itertools.combinations(sorted(GROUP_BITS, reverse=True), count):
                yield tuple(map(ChannelGroup, widths, falling))


def _single_cuts(dim: int) -> Iterator[tuple[ChannelGroup, ...]]:
    if dim not in _SINGLE_CHANNELS:
        raise ValueError(
            f"expected a head size of 64, 80, … 256 for one channel group, found {dim}"
        )
    for channels, bits in itertools.product(_SINGLE_CHANNELS, _SINGLE_BITS):
        if channels <= dim:
            groups = (ChannelGroup(channels, bits), ChannelGroup(dim - channels, 0))
            yield groups if channels < dim else groups[:1]


def _running_sums(spread_HD: Tensor) -> list[list[float]]:
    """Each head's sums of the first 0, 1, … D channels."""
    rows: list[list[float]] = spread_HD.double().cumsum(-1).tolist()
    return [[0.0, *row] for row in rows]


def _cost(sums: Sequence[Sequence[float]], groups: Sequence[ChannelGroup]) -> float:
    total, start = 0.0, 0
    for group in groups:
        stop = start + group.channels
        error = distortion(group.bits) if group.bits else 1.0
        total += error * sum((head[stop] - head[start]) ** 2 for head in sums) / group.channels
        start = stop
    return total
