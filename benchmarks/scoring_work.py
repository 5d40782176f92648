"""What the scoring benchmark scores: pairs of a prompt and an answer, with their token ids."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stillhouse.workers.models.language_model import TextCodec
from stillhouse.workers.protocols import Pair

_SPREAD = 0.4  # lengths are drawn evenly from so far around their mean
_SYLLABLES = ("ba", "co", "du", "fe", "gi", "lo", "mar", "nen", "pil", "rus", "sta", "ter", "vo")


@dataclass(frozen=True)
class Shape:
    """Mean tokens of prompt and answer, and tokens that all prompts begin with."""

    name: str
    prompt: int
    answer: int
    shared: int = 0


SHAPES = (Shape("short", 25, 4), Shape("long", 60, 60), Shape("few-shot", 20, 5, shared=300))


@dataclass(frozen=True)
class Work:
    """Pairs as texts and as ids (prompt, answer): every contender scores the same tokens."""

    name: str
    pairs: list[tuple[str, str]]
    ids: list[tuple[list[int], list[int]]]

    @property
    def tokens(self) -> int:
        """Of all prompts and answers."""
        return sum(len(prompt) + len(answer) for prompt, answer in self.ids)

    def as_pairs(self) -> list[Pair]:
        """What the scorer takes."""
        return [Pair(*pair) for pair in self.pairs]


def invented_text(words: int, seed: int = 0) -> str:
    """Words of a few syllables, frequent and rare ones, in sentences."""
    draw = random.Random(seed)
    lexicon = ["".join(draw.choices(_SYLLABLES, k=draw.randint(1, 3))) for _ in range(2000)]
    weights = [1 / rank for rank in range(1, len(lexicon) + 1)]
    chosen = draw.choices(lexicon, weights, k=words)
    return " ".join(word + ("." if at % 11 == 10 else "") for at, word in enumerate(chosen))


def work_of(codec: TextCodec, shape: Shape, text: str, count: int, seed: int = 0) -> Work:
    """Pieces of the text, begun at random words; the same seed gives the same pairs."""
    words = text.split()
    draw = random.Random(f"{seed}/{shape.name}")
    head = _piece(codec.encode_prompt, words, 0, shape.shared)
    pairs = []
    for _ in range(count):
        start = draw.randrange(len(words) // 2)
        prompt = _piece(codec.encode_prompt, words, start, _length(draw, shape.prompt))
        start += len(prompt.split())
        answer = _piece(codec.encode_response, words, start, _length(draw, shape.answer))
        pairs.append((f"{head}\n{prompt}" if head else prompt, f" {answer}"))
    prompts = codec.encode_prompts([prompt for prompt, _ in pairs])
    answers = [codec.encode_response(answer) for _, answer in pairs]
    return Work(shape.name, pairs, list(zip(prompts, answers, strict=True)))


def _length(draw: random.Random, mean: int) -> int:
    return max(1, round(mean * draw.uniform(1 - _SPREAD, 1 + _SPREAD)))


def _piece(
    encode: Callable[[str], Sequence[int]], words: Sequence[str], start: int, tokens: int
) -> str:
    """About so many tokens, whole words."""
    if not tokens:
        return ""
    stretch = words[start : start + tokens]
    if not stretch:
        raise SystemExit(f"--text: expected more than {2 * start} words, found {len(words)}")
    share = tokens / len(encode(" ".join(stretch)))
    return " ".join(stretch[: max(1, round(share * len(stretch)))])
