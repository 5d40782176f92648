"""The order of the examples and the learning rate: both derived from the step, so never stored."""

import math
import random
from collections.abc import Sequence

WINDOW_BATCHES = 8  # batches' worth of examples that are sorted by length together


def epoch_batches(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int
) -> list[list[int]]:
    """The batches of one epoch, each a list of indices; every index occurs once.

    A seeded permutation is cut into windows; within a window examples of like length share a batch,
    because padding costs as much as text; then the batches are shuffled. Depends on nothing but its
    arguments: a resumed run asks for the same epoch again and goes on inside it.
    """
    draw = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    draw.shuffle(order)
    span = batch_size * WINDOW_BATCHES
    batches = []
    for start in range(0, len(order), span):
        window = sorted(order[start : start + span], key=lambda index: lengths[index])
        batches += [window[at : at + batch_size] for at in range(0, len(window), batch_size)]
    draw.shuffle(batches)
    return batches


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Optimizer steps of one epoch; the last batch may be short."""
    return math.ceil(examples / batch_size)


def learning_rate(step: int, total: int, peak: float, warmup_fraction: float) -> float:
    """Linear warmup to `peak`, then linear decay; `step` counts from 1 to `total`.

    No step has rate 0: warmup starts at peak / warmup steps, and decay would reach 0 one step after
    the last.
    """
    warmup = round(total * warmup_fraction)
    if step <= warmup:
        return peak * step / warmup
    return peak * (total - step + 1) / (total - warmup)
