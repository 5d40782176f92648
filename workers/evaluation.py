"""How good an answer is: exact match, and perplexity of the right one. No torch."""

import math
from collections.abc import Iterable


def exact_match(prediction: str, reference: str) -> bool:
    """Whether both say the same, up to case, white space and a full stop at the end."""
    return _plain(prediction) == _plain(reference)


def perplexity(logp_sums: Iterable[float], tokens: int) -> float:
    """exp(-sum of log-probabilities / tokens): nats in, float64 throughout; inf past its range.

    Raises `ValueError` for no tokens: their perplexity is not 1.
    """
    if tokens < 1:
        raise ValueError(f"perplexity: expected at least one token, found {tokens}")
    try:
        return math.exp(-math.fsum(logp_sums) / tokens)
    except OverflowError:
        return math.inf


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()
