"""Batches of token sequences: like lengths together, padding that no real token can see.

Shape letters: B rows of a batch, T positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from stillhouse.kernels.turboquant import NotFiniteError
from stillhouse.workers.protocols import Failed

T = TypeVar("T")
R = TypeVar("R")

# What a batch costs beside its tokens, in tokens: weights are read, layers are called.
_BATCH_TOKENS = 64


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """Token ids with an explicit mask and explicit positions, all int64 `[B, T]`.

    Masks are never derived from the pad id: some tokenizers pad with their EOS.
    """

    ids: Tensor
    mask: Tensor  # 1 where a real token is
    positions: Tensor  # each row counts its own tokens from 0


def length_buckets(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Split indices into batches of at most `batch_size` rows of similar length.

    Longest first, so that a batch too big for the memory fails at the start and not at the end;
    equal lengths stay in the order given, so the same rows make the same batches.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, found {batch_size}")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def tight_buckets(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """As `length_buckets`, but a batch ends early where going on would pad more than it saves.

    It ends where the rows that could still join would be padded by `_BATCH_TOKENS` or more in all:
    about what one more batch costs.
    """
    buckets: list[list[int]] = []
    for bucket in length_buckets(lengths, max(len(lengths), 1) if batch_size > 0 else batch_size):
        start = 0
        while start < len(bucket):
            stop = _tight_stop([lengths[i] for i in bucket[start : start + batch_size]])
            buckets.append(bucket[start : start + stop])
            start += stop
    return buckets


def _tight_stop(lengths: Sequence[int]) -> int:
    """How many of these, longest first, go into one batch."""
    for stop in range(1, len(lengths)):
        if (lengths[0] - lengths[stop]) * (len(lengths) - stop) >= _BATCH_TOKENS:
            return stop
    return len(lengths)


def set_broken_aside(
    answer: Callable[[Sequence[T]], Sequence[R]], members: Sequence[T]
) -> list[R | Failed]:
    """Answer a batch; where a compressed cache cannot hold it, its members one by one."""
    try:
        return list(answer(members))
    except NotFiniteError as error:
        if len(members) == 1:
            return [Failed(f"not_finite: {error}")]
        return [one for member in members for one in set_broken_aside(answer, [member])]


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> PaddedBatch:
    """Pad on the left: every row ends at the last position, where generation goes on."""
    return _padded(rows, pad, device, left=True)


def pad_right(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> PaddedBatch:
    """Pad on the right: under a causal mask no real token comes after padding."""
    return _padded(rows, pad, device, left=False)


def _padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device, *, left: bool
) -> PaddedBatch:
    width = max(len(row) for row in rows)
    ids, mask, positions = [], [], []
    for row in rows:
        gap = width - len(row)
        before, after = (gap, 0) if left else (0, gap)
        ids.append([pad] * before + list(row) + [pad] * after)
        mask.append([0] * before + [1] * len(row) + [0] * after)
        positions.append([0] * before + list(range(len(row))) + [0] * after)
    return PaddedBatch(
        torch.tensor(ids, dtype=torch.long, device=device),
        torch.tensor(mask, dtype=torch.long, device=device),
        torch.tensor(positions, dtype=torch.long, device=device),
    )
