"""Sharing out bits: against every combination, on curves small enough for it."""

import itertools
from collections.abc import Sequence

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
from stillhouse.workers.bits import Part, allocate


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


def test_what_does_not_fit_is_passed_over_for_what_does() -> None:
    # After STEEP's first step 8 bits are left: TWO_HEADS needs 16, STEEP's next one 8.
    assert bits(allocate([STEEP, TWO_HEADS], 32 + 8)) == [24, 8]


def test_a_layer_that_keeps_half_of_the_tokens_pays_half() -> None:
    sliding = Part(2, TWO_HEADS.curve, stored=0.5)  # 8 bits a token more for 45 less
    assert bits(allocate([FLAT, sliding], 16 + 8)) == [8, 16]
    assert bits(allocate([FLAT, TWO_HEADS], 24 + 8)) == [16, 8]


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
def test_no_other_combination_is_cheaper_by_more_than_a_step(data: st.DataObject) -> None:
    parts = []
    for _ in range(data.draw(st.integers(1, 4))):
        gains = sorted(data.draw(st.lists(st.integers(1, 40), max_size=4)), reverse=True)
        costs = list(itertools.accumulate(gains, lambda cost, gain: cost - gain, initial=200))
        points = [(8 * (place + 1), float(cost)) for place, cost in enumerate(costs)]
        stored = data.draw(st.sampled_from([1.0, 0.5]))
        parts.append(Part(data.draw(st.integers(1, 3)), curve(*points), stored))
    budget = data.draw(st.floats(sum(p.bits(0) for p in parts), 400))
    found = allocate(parts, budget)
    assert spent(parts, found) <= budget
    cost = sum(choice.cost for choice in found)
    everywhere = itertools.product(*(part.curve for part in parts))
    best = min(sum(c.cost for c in other) for other in everywhere if spent(parts, other) <= budget)
    # What the greedy order leaves is less than the first step that did not fit would save.
    missed = [
        part.curve[place].cost - part.curve[place + 1].cost
        for part, choice in zip(parts, found, strict=True)
        if (place := part.curve.index(choice)) + 1 < len(part.curve)
    ]
    assert cost - best <= max(missed, default=0.0) + 1e-9


def spent(parts: Sequence[Part], choices: Sequence[GroupChoice]) -> float:
    return sum(
        part.stored * part.copies * choice.bits for part, choice in zip(parts, choices, strict=True)
    )
