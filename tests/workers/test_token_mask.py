"""Which tokens of an answer are trained on."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.workers.token_mask import excess_of, top_share

ENDS = st.lists(st.integers(1, 6), min_size=1, max_size=8).map(
    lambda steps: [sum(steps[: n + 1]) for n in range(len(steps))]
)


def test_the_same_cut_keeps_every_value() -> None:
    assert excess_of([2, 3, 7], [2, 3, 7], [0.5, -1.0, 2.0]) == [0.5, -1.0, 2.0]


def test_a_token_cut_in_two_gives_each_its_characters() -> None:
    assert excess_of([1, 4], [4], [2.0]) == [0.5, 1.5]


def test_tokens_that_lie_in_one_are_summed() -> None:
    assert excess_of([4], [1, 4], [0.5, 1.5]) == [2.0]


def test_cuts_that_cross() -> None:
    """Characters 0-2 hold 3.0, 2-4 hold 1.0; cut at 3."""
    assert excess_of([3, 4], [2, 4], [3.0, 1.0]) == [3.5, 0.5]


def test_a_character_of_several_tokens() -> None:
    """Byte tokens of one character end where the first of them does."""
    assert excess_of([1, 2], [1, 1, 2], [0.5, 0.25, 1.0]) == [0.75, 1.0]
    assert excess_of([1, 1, 2], [1, 2], [0.5, 1.0]) == [0.5, 0.0, 1.0]


def test_nothing() -> None:
    assert excess_of([], [], []) == []


@given(ENDS, ENDS, st.data())
def test_the_sum_stays(ends: list[int], source: list[int], data: st.DataObject) -> None:
    source = [min(end, ends[-1]) for end in source[:-1]] + [ends[-1]]
    values = data.draw(st.lists(st.floats(-9, 9), min_size=len(source), max_size=len(source)))
    found = excess_of(ends, source, values)
    assert len(found) == len(ends)
    assert math.fsum(found) == pytest.approx(math.fsum(values), abs=1e-9)


@pytest.mark.parametrize(
    ("share", "kept"),
    [(0.2, [False, True, False, False]), (0.5, [True, True, False, False]), (1.0, [True] * 4)],
)
def test_the_top_share_is_rounded_up_and_ties_go_to_the_first(
    share: float, kept: list[bool]
) -> None:
    assert top_share([1.0, 2.0, 1.0, 0.5], share) == kept


def test_a_tenth_of_ten_is_one() -> None:
    assert sum(top_share([float(n) for n in range(10)], 0.1)) == 1
    assert sum(top_share([float(n) for n in range(10)], 0.7)) == 7
