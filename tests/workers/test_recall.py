"""Rows that repeat themselves."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.workers.recall import SPAN, recalling


def test_a_row_and_spans_of_it():
    [row] = recalling([range(100)], 0.5, 1000, 0)
    assert row[:100] == list(range(100))
    assert len(row) == 200
    breaks = [i for i in range(100, 200) if row[i] != row[i - 1] + 1]
    assert all(b - a <= SPAN[1] for a, b in itertools.pairwise(breaks))
    assert len(breaks) >= 100 // SPAN[1]


def test_no_share_leaves_rows_alone():
    assert list(recalling([[1, 2], [3]], 0.0, 10, 0)) == [[1, 2], [3]]


def test_a_seed_draws_the_same_spans():
    rows = [range(60), range(60)]
    one, two, other = (list(recalling(rows, 0.5, 99, seed)) for seed in (0, 0, 1))
    assert one == two != other
    assert one[0] != one[1]


@given(st.integers(1, 300), st.floats(0, 0.9), st.integers(2, 200))
def test_lengths(length, share, limit):
    [row] = recalling([list(range(length))], share, limit, 0)
    kept = min(length, max(round(limit * (1 - share)), 1))
    assert len(row) == min(max(round(kept / (1 - share)), kept), limit)
    assert row[:kept] == list(range(kept))
    assert set(row) <= set(range(kept))


def test_rows_are_made_as_they_are_asked_for():
    rows = recalling(iter([[1] * 20, [2] * 20]), 0.5, 100, 0)
    assert next(rows) == [1] * 40
    assert next(rows) == [2] * 40
    with pytest.raises(StopIteration):
        next(rows)
