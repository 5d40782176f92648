"""Token rows that repeat themselves, to calibrate a cache for what it is there for.

Plain text seldom asks for a thing word by word, so the errors that spoil retrieval cost a
calibration on plain text nothing. Where spans come again, the model copies them from its cache
(the induction heads of Olsson et al., arXiv:2209.11895), and those errors show.
"""

import random
from collections.abc import Iterable, Iterator, Sequence

SPAN = (12, 48)  # tokens


def recalling(
    rows: Iterable[Sequence[int]], share: float, limit: int, seed: int
) -> Iterator[list[int]]:
    """Each row, then spans of it at random, which make `share` of what comes out.

    limit: tokens of a row at most, the model's context; what is longer is cut first.
    """
    draw = random.Random(seed)
    for row in rows:
        kept = list(row[: max(round(limit * (1 - share)), 1)])
        length = min(round(len(kept) / (1 - share)), limit)
        out = list(kept)
        while len(out) < length:
            start = draw.randrange(max(len(kept) - SPAN[0], 1))
            out += kept[start : start + draw.randint(*SPAN)]
        yield out[:length]
