"""Sharing out bits: against every combination, on curves small enough for it."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.kernels.turboquant import (
    ChannelGroup,
    GroupChoice,
    choose_groups,
    expected_cost,
    group_curve,
)
from stillhouse.workers.bits import Part, allocate, reach


def curve(*points: tuple[int, float]) -> list[GroupChoice]:
    return [GroupChoice(bits, cost, (ChannelGroup(8, bits),)) for bits, cost in points]


STEEP = Part(1, curve((8, 100), (16, 20), (24, 4)))
FLAT = Part(1, curve((8, 10), (16, 3), (24, 1)))
TWO_HEADS = Part(2, curve((8, 60), (16, 15)))  # 16 bits a token more for 45 less


def bits(choices: list[GroupChoice]) -> list[int]:
    return [choice.bits for choice in choices]


def test_bits_go_where_they_save_most() -> None:
    # Savings a bit: STEEP 10, 2; FLAT .875, .25; TWO_HEADS 45/16 = 2.8.
    parts = [STEEP, FLAT, TWO_HEADS]
    assert bits(allocate(parts, 32)) == [8, 8, 8]
    assert bits(allocate(parts, 40)) == [16, 8, 8]
    assert bits(allocate(parts, 56)) == [16, 8, 16]
    assert bits(allocate(parts, 64)) == [24, 8, 16]
    assert bits(allocate(parts, 10**6)) == [24, 24, 16]
    with pytest.raises(ValueError, match="at least 32 bits a token, found 31"):
        allocate(parts, 31)


def test_the_fewest_bits_that_reach_a_cost() -> None:
    parts = [STEEP, FLAT]
    assert bits(reach(parts, 110)) == [8, 8]
    assert bits(reach(parts, 30)) == [16, 8]
    assert bits(reach(parts, 7)) == [24, 16]
    assert bits(reach(parts, 0)) == [24, 24]


@given(st.lists(st.floats(-3, 0), min_size=16, max_size=16), st.integers(16, 80))
def test_a_curve_is_convex_and_touches_the_best_choice(exponents: list[float], budget: int) -> None:
    spread = torch.tensor([sorted(10**e for e in exponents)[::-1]], dtype=torch.float64)
    found = group_curve(spread)
    gains = [(a.cost - b.cost) / (b.bits - a.bits) for a, b in itertools.pairwise(found)]
    assert gains == sorted(gains, reverse=True)
    assert all(gain > 0 for gain in gains)
    for choice in found:
        assert choice.cost == pytest.approx(expected_cost(spread, choice.groups))
        assert choice.bits == sum(group.channels * group.bits for group in choice.groups)
        best = choose_groups(spread, choice.bits / 16)
        assert choice.cost == pytest.approx(expected_cost(spread, best))
    # Nothing lies below the curve.
    best_cost = expected_cost(spread, choose_groups(spread, budget / 16))
    left = max((c for c in found if c.bits <= budget), key=lambda c: c.bits, default=None)
    right = min((c for c in found if c.bits > budget), key=lambda c: c.bits, default=None)
    if left and right:
        share = (budget - left.bits) / (right.bits - left.bits)
        assert best_cost >= left.cost + share * (right.cost - left.cost) - 1e-9


@given(st.data())
def test_no_other_combination_within_the_bits_spent_is_cheaper(data: st.DataObject) -> None:
    parts = []
    for _ in range(data.draw(st.integers(1, 4))):
        gains = sorted(data.draw(st.lists(st.integers(1, 40), max_size=4)), reverse=True)
        costs = list(itertools.accumulate(gains, lambda cost, gain: cost - gain, initial=200))
        points = [(8 * (place + 1), float(cost)) for place, cost in enumerate(costs)]
        parts.append(Part(data.draw(st.integers(1, 3)), curve(*points)))
    budget = data.draw(st.integers(sum(p.bits(0) for p in parts), 400))
    found = allocate(parts, budget)
    spent = sum(part.copies * choice.bits for part, choice in zip(parts, found, strict=True))
    assert spent <= budget
    cost = sum(choice.cost for choice in found)
    for other in itertools.product(*(part.curve for part in parts)):
        used = sum(part.copies * choice.bits for part, choice in zip(parts, other, strict=True))
        if used <= spent:
            assert sum(choice.cost for choice in other) >= cost - 1e-9
