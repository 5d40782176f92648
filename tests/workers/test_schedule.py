"""The learning rate and the order of the examples, from the step alone."""

import math

import pytest

from stillhouse.workers.schedule import epoch_batches, learning_rate


def test_learning_rate_by_hand():
    rates = [learning_rate(step, 10, 1.0, 0.2) for step in range(1, 11)]
    assert rates == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_an_epoch_shows_every_example_once_in_batches_of_like_length():
    lengths = [index % 40 for index in range(103)]
    batches = epoch_batches(lengths, 4, seed=1, epoch=0)
    assert sorted(index for batch in batches for index in batch) == list(range(103))
    assert len(batches) == math.ceil(103 / 4)
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    assert padded < 1.25 * sum(lengths)
    assert batches == epoch_batches(lengths, 4, seed=1, epoch=0)
    assert batches != epoch_batches(lengths, 4, seed=1, epoch=1)
    assert batches != epoch_batches(lengths, 4, seed=2, epoch=0)
