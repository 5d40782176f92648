"""New prompts in the likeness of selected ones: few-shot continuation, and mutation.

A model that continues a list writes new prompts of a kind; a mutator recombines the parts that
selected prompts are made of, and covers what a small model never thinks of
(docs/decisions/0005-prompt-generators.md).
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest

from stillhouse.pipelines.forms import Form, mine, strong

JOIN = ", "


@dataclass(frozen=True, slots=True)
class Seed:
    """A selected prompt that new ones are made from, and the specialist's answer to it."""

    prompt_id: str
    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class Proposal:
    """A new prompt's text and the seed it came from."""

    parent_id: str
    text: str


@dataclass(frozen=True, slots=True)
class FewShot:
    """A list of seeds for a model to continue, or to add to where it takes instructions."""

    parent_id: str
    prompt: str
    instruction: str


def few_shot(seeds: Sequence[Seed], shots: int, count: int, random_seed: str) -> list[FewShot]:
    """Draw `count` lists of up to `shots` different seeds; the last one is the parent.

    The seeds of a list share an answer where enough do: a small model goes on about one thing.
    """
    source = random.Random(random_seed)
    groups = [group for group in _by_answer(seeds).values() if len(group) >= shots]
    lists = []
    for _ in range(count):
        group = source.choice(groups) if groups else seeds
        lists.append(source.sample(group, min(shots, len(group))))
    return [_shown(chosen) for chosen in lists]


def _shown(seeds: Sequence[Seed]) -> FewShot:
    lines = "\n".join(f"- {seed.text}" for seed in seeds)
    asked = (
        f"{lines}\n\nWrite one more of the same kind, another one, in one line and nothing else."
    )
    return FewShot(seeds[-1].prompt_id, f"More of the same kind:\n{lines}\n-", asked)


def mutate(
    seeds: Sequence[Seed],
    count: int,
    random_seed: str,
    further: Sequence[str] = (),
    first: int = 0,
) -> list[Proposal]:
    """Recombine seeds: their forms with each other's fillers, and heads with tails, in turn.

    `further` texts lend fillers. Up to `count` different texts that are none of either, after the
    `first` ones that the same seed makes; fewer where the seeds allow no more.
    """
    source = random.Random(random_seed)
    known = {seed.text for seed in seeds} | set(further)
    made = (
        _refilled(seeds, further, source),
        _crossed(seeds, first + count, random.Random(f"{random_seed}/crossed")),
    )
    both = chain.from_iterable(zip_longest(*made))
    return list(islice(_new(both, known), first, first + count))


def _new(proposals: Iterator[Proposal | None], known: set[str]) -> Iterator[Proposal]:
    for proposal in proposals:
        if proposal is not None and proposal.text not in known:
            known.add(proposal.text)
            yield proposal


def _refilled(
    seeds: Sequence[Seed], further: Sequence[str], source: random.Random
) -> Iterator[Proposal]:
    """Well-supported forms with fillers, then all: a form once with each, one after the other.

    Of the fillers that are no accident those come first that were seen in the fewest forms.
    """
    mined = mine([seed.text for seed in seeds], further)
    enough = strong([form.support for form in mined.forms])
    often = [form for form in mined.forms if form.support >= enough]
    seldom = [form for form in mined.forms if form.support < enough]
    known = [_by_support(fillers, source) for fillers in mined.fillers]
    for forms, tier in ((often, 0), (seldom, 0), (often, 1), (seldom, 1)):
        source.shuffle(forms)
        for form, filler in _turns(forms, [tiers[tier] for tiers in known]):
            yield Proposal(seeds[form.place].prompt_id, form.filled(filler))


def _turns(forms: Sequence[Form], fillers: Sequence[Sequence[str]]) -> Iterator[tuple[Form, str]]:
    """Each form with one filler of its kind, then each with another, until all are through."""
    for turn in range(max((len(fillers[form.kind]) for form in forms), default=0)):
        for place, form in enumerate(forms):
            kind = fillers[form.kind]
            if turn < len(kind):
                yield form, kind[(turn + place) % len(kind)]  # not the same one for every form


def _by_support(fillers: Mapping[str, int], source: random.Random) -> tuple[list[str], list[str]]:
    """Fillers that are no accident, the least seen first; and the others, the most seen first."""
    enough = max(strong(list(fillers.values())), 1)
    order = source.sample(list(fillers), len(fillers))
    often = [filler for filler in order if fillers[filler] >= enough]
    seldom = [filler for filler in order if fillers[filler] < enough]
    return sorted(often, key=fillers.__getitem__), sorted(seldom, key=lambda f: -fillers[f])


def _crossed(seeds: Sequence[Seed], count: int, source: random.Random) -> Iterator[Proposal]:
    """The head of one seed with the tail of another that has the same answer, cut at commas."""
    parts = {seed.prompt_id: seed.text.split(JOIN) for seed in seeds}
    groups = _by_answer([seed for seed in seeds if len(parts[seed.prompt_id]) > 1])
    crossable = [group for group in groups.values() if len(group) > 1]
    weights = [len(group) for group in crossable]
    for _ in range(20 * count if crossable else 0):
        [group] = source.choices(crossable, weights)
        head, tail = source.sample(group, 2)
        text = _cross(parts[head.prompt_id], parts[tail.prompt_id], source)
        yield Proposal(head.prompt_id, text)


def _by_answer(seeds: Sequence[Seed]) -> dict[str, list[Seed]]:
    groups: dict[str, list[Seed]] = {}
    for seed in seeds:
        groups.setdefault(seed.answer, []).append(seed)
    return groups


def _cross(head: Sequence[str], tail: Sequence[str], source: random.Random) -> str:
    kept, taken = source.randrange(1, len(head)), source.randrange(1, len(tail))
    return JOIN.join((*head[:kept], *tail[taken:]))
