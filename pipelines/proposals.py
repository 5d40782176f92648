"""New prompts in the likeness of selected ones: few-shot continuation, and mutation.

A model that continues a list writes new prompts of a kind; a mutator swaps the parts that the
prompts of the pool are made of. Mutation covers what a small model never thinks of
(docs/decisions/0005-prompt-generators.md).
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

SEPARATORS = re.compile(r"(, | with | without | of | due to | and )")


@dataclass(frozen=True, slots=True)
class Seed:
    """A selected prompt that new ones are made from."""

    prompt_id: str
    text: str


@dataclass(frozen=True, slots=True)
class Proposal:
    """A new prompt's text and the seed it came from."""

    parent_id: str
    text: str


@dataclass(frozen=True, slots=True)
class FewShot:
    """A list of seeds for a model to continue."""

    parent_id: str
    prompt: str


def few_shot(seeds: Sequence[Seed], shots: int, count: int, random_seed: str) -> list[FewShot]:
    """Draw `count` lists of up to `shots` different seeds; the last one is the parent."""
    source = random.Random(random_seed)
    lists = [source.sample(seeds, min(shots, len(seeds))) for _ in range(count)]
    return [FewShot(chosen[-1].prompt_id, _list_prompt(chosen)) for chosen in lists]


def _list_prompt(seeds: Sequence[Seed]) -> str:
    lines = "\n".join(f"- {seed.text}" for seed in seeds)
    return f"More of the same kind:\n{lines}\n-"


def mutate(seeds: Sequence[Seed], count: int, random_seed: str) -> list[Proposal]:
    """Swap one part of a seed for the part at the same place of another seed of the same form.

    A form is the sequence of separators ("… of …, … with …"); its parts are the slots. Up to
    `count` different texts that are not seeds, fewer where the seeds allow no more.
    """
    source = random.Random(random_seed)
    parts = [(seed, SEPARATORS.split(seed.text)) for seed in seeds]
    forms: dict[tuple[str, ...], list[list[str]]] = {}
    for _, pieces in parts:
        forms.setdefault(tuple(pieces[1::2]), []).append(pieces)
    mutable = [(seed, pieces) for seed, pieces in parts if _has_partner(pieces, forms)]
    known = {seed.text for seed in seeds}
    proposals: list[Proposal] = []
    for _ in range(20 * count if mutable else 0):
        if len(proposals) == count:
            break
        seed, pieces = source.choice(mutable)
        text = _swap(pieces, source.choice(forms[tuple(pieces[1::2])]), source)
        if text not in known:
            known.add(text)
            proposals.append(Proposal(seed.prompt_id, text))
    return proposals


def _has_partner(pieces: list[str], forms: dict[tuple[str, ...], list[list[str]]]) -> bool:
    return len(pieces) > 1 and len(forms[tuple(pieces[1::2])]) > 1


def _swap(pieces: list[str], other: list[str], source: random.Random) -> str:
    slot = 2 * source.randrange((len(pieces) + 1) // 2)
    return "".join((*pieces[:slot], other[slot], *pieces[slot + 1 :]))
