import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.workers.batching import length_buckets, pad_left, pad_right, tight_buckets

CPU = torch.device("cpu")


def test_longest_come_first_and_equal_lengths_keep_their_order():
    assert length_buckets([3, 5, 3, 1, 5], 2) == [[1, 4], [0, 2], [3]]


def test_no_rows_make_no_batches():
    assert length_buckets([], 4) == []


def test_a_batch_needs_a_row():
    with pytest.raises(ValueError, match="at least 1"):
        length_buckets([1], 0)


@given(st.lists(st.integers(1, 50)), st.integers(1, 9))
def test_every_row_is_in_one_batch(lengths, batch_size):
    batches = length_buckets(lengths, batch_size)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(batch) <= batch_size for batch in batches)


def test_left_padding_ends_every_row_at_the_last_position():
    batch = pad_left([[7, 8, 9], [5]], pad=5, device=CPU)
    assert batch.ids.tolist() == [[7, 8, 9], [5, 5, 5]]
    assert batch.mask.tolist() == [[1, 1, 1], [0, 0, 1]]  # not from the id: 5 is also pad
    assert batch.positions.tolist() == [[0, 1, 2], [0, 0, 0]]


def test_right_padding_starts_every_row_at_the_first_position():
    batch = pad_right([[7, 8, 9], [5]], pad=5, device=CPU)
    assert batch.ids.tolist() == [[7, 8, 9], [5, 5, 5]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2], [0, 0, 0]]


def test_a_batch_ends_where_padding_would_cost_more_than_another_batch():
    assert tight_buckets([100, 100, 30, 30, 30], 8) == [[0, 1], [2, 3, 4]]
    assert tight_buckets([40, 30, 30], 8) == [[0, 1, 2]]
    assert tight_buckets([], 4) == []
    with pytest.raises(ValueError, match="batch_size"):
        tight_buckets([1], 0)


@given(st.lists(st.integers(1, 300), max_size=80), st.integers(1, 9))
def test_tight_batches_hold_every_row_once_with_bounded_padding(lengths, batch_size):
    batches = tight_buckets(lengths, batch_size)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        longest = max(lengths[row] for row in batch)
        for at, row in enumerate(batch[1:], start=1):
            assert (longest - lengths[row]) * (len(batch) - at) < 64
