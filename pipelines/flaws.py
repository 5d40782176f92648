"""What makes an answer no example: short, broken, an echo, a loop."""

import unicodedata
from collections.abc import Sequence

from stillhouse.pipelines.evaluation_overlap import words

GRAM = 4
LEAST_GRAMS = 8  # a list of a few numbers repeats itself, too
_BROKEN = "\ufffd"  # what stands for bytes that are no text


def flaw_of(
    prompt: str, answer: str, token_ids: Sequence[int], min_tokens: int, max_repetition: float
) -> str | None:
    """Why an answer of these tokens is no example; None where it is one."""
    if len(token_ids) < min_tokens:
        return "short_answer"
    if any(letter == _BROKEN or _is_control(letter) for letter in answer):
        return "broken_characters"
    if not any(letter.isalnum() for letter in answer):
        return "no_words"
    if words(prompt) == words(answer):
        return "echo"
    if repetition(token_ids) > max_repetition:
        return "repetition"
    return None


def repetition(token_ids: Sequence[int]) -> float:
    """The share of token 4-grams that were there before; 0 for fewer than 8 of them.

    seq-rep-4 of Welleck et al., arXiv:1908.04319, §6.
    """
    grams = [tuple(token_ids[at : at + GRAM]) for at in range(len(token_ids) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) >= LEAST_GRAMS else 0.0


def _is_control(letter: str) -> bool:
    return unicodedata.category(letter) == "Cc" and letter not in "\n\t\r"
