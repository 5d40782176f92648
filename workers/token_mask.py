"""Which tokens of an answer to train on: those that the specialist knows and its base does not.

The excess of a token, log p_specialist - log p_base, is measured in the base's tokenizer; the
target cuts the same answer elsewhere. An excess is spread evenly over its token's characters, and
a token of the target has what falls on its own: the sum over an answer stays what it was.
(TiTok, arXiv:2510.04682, keeps the top share of an answer's tokens by excess.)
"""

import math
from collections.abc import Sequence


def excess_of(
    ends: Sequence[int], source_ends: Sequence[int], excess: Sequence[float]
) -> list[float]:
    """The excess (nats) of tokens that end at `ends`, from that of tokens that end at others.

    Ends are in characters and do not fall. What lies behind the last of `ends` is its token's.
    """
    begins = [0, *ends[:-1]]
    found = [0.0] * len(ends)
    if not ends:
        return found
    start = 0
    for end, value in zip(source_ends, excess, strict=True):
        overlaps = [
            max(0, min(end, theirs_end) - max(start, theirs))
            for theirs, theirs_end in zip(begins, ends, strict=True)
        ]
        total = sum(overlaps)
        if total == 0:  # a further piece of one character, or behind the end
            found[_holder(ends, min(end, ends[-1]))] += value
        else:
            for place, overlap in enumerate(overlaps):
                found[place] += value * overlap / total
        start = max(start, end)
    return found


def _holder(ends: Sequence[int], character: int) -> int:
    """The first token that reaches a character."""
    return next(place for place, end in enumerate(ends) if end >= character)


def top_share(values: Sequence[float], share: float) -> list[bool]:
    """Mark the largest `share` of values, rounded up; of equal ones the first."""
    count = math.ceil(round(share * len(values), 9))
    order = sorted(range(len(values)), key=lambda place: (-values[place], place))
    kept = set(order[:count])
    return [place in kept for place in range(len(values))]
