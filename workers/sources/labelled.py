"""Splits of labelled texts: what a specialist learns, what is asked, and what it never saw.

- ``private``: what the specialist learns, of ``categories`` labels. ``{"prompt", "response"}``.
- ``evaluation``: further texts of those labels.
- ``pool``: further texts of those labels, unlabelled. Rows ``{"prompt", "origin"}``.
- ``truth``: the pool with its labels, for measurements; no recipe reads it.
- ``seeds``: the first ``seeds`` texts of the pool.
- ``lookalike``: texts of labels that the specialist never learns, unlabelled.

No text occurs in two splits, but for the pool's three forms.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, TypeVar

from stillhouse.errors import ConfigError, SourceError

Row = dict[str, str]
T = TypeVar("T")
Texts = Mapping[str, Sequence[str]]  # by label, no text twice


@dataclass(frozen=True, slots=True)
class LabelledConfig:
    """Sizes of the splits; the ``*_per_category`` counts are exact, for each learnt label."""

    categories: int
    pool_per_category: int
    lookalikes: int
    train_per_category: int
    test_per_category: int
    seeds: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        require_counts(self)


def require_counts(config: LabelledConfig) -> None:
    """Raise ConfigError where a count is below 0."""
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, int) and field.name != "seed" and value < 0:
            raise ConfigError(f"{field.name} must be 0 or more, found {value}")


class Labelled(NamedTuple):
    """A text and its label."""

    text: str
    label: str


@dataclass(frozen=True, slots=True)
class Speciality:
    """A partition of labelled texts. `name` begins the origins of the pool and of look-alikes."""

    name: str
    private: Sequence[Labelled]
    evaluation: Sequence[Labelled]
    pool: Sequence[Labelled]
    lookalike: Sequence[str]
    seeds: int
    seed: int

    def rows(self, split: str) -> Iterator[Row]:
        """The rows of one split, shuffled: any prefix is a sample. ConfigError for others."""
        makers: Mapping[str, Callable[[], list[Row]]] = {
            "private": lambda: self._labelled(split, self.private),
            "evaluation": lambda: self._labelled(split, self.evaluation),
            "pool": self._unlabelled_pool,
            "truth": lambda: self._labelled("pool", self.pool),
            "seeds": lambda: self._seeds(),
            "lookalike": lambda: [
                {"prompt": text, "origin": f"{self.name}_other"}
                for text in self._shuffled(split, self.lookalike)
            ],
        }
        if split not in makers:
            raise ConfigError(f"unknown split {split!r}: expected one of {', '.join(makers)}")
        return iter(makers[split]())

    def _labelled(self, order: str, pairs: Sequence[Labelled]) -> list[Row]:
        return [
            {"prompt": pair.text, "response": pair.label} for pair in self._shuffled(order, pairs)
        ]

    def _unlabelled_pool(self) -> list[Row]:
        origin = f"{self.name}_same"
        return [
            {"prompt": pair.text, "origin": origin} for pair in self._shuffled("pool", self.pool)
        ]

    def _seeds(self) -> list[Row]:
        if self.seeds > len(self.pool):
            raise SourceError(f"seeds: asked for {self.seeds}, the pool has {len(self.pool)}")
        return self._unlabelled_pool()[: self.seeds]

    def _shuffled(self, order: str, items: Sequence[T]) -> list[T]:
        shuffled = list(items)
        random.Random(f"{self.seed}/order/{order}").shuffle(shuffled)
        return shuffled


def divide(name: str, texts: Texts, tests: Texts | None, config: LabelledConfig) -> Speciality:
    """Choose the learnt labels and divide their texts; `tests`: evaluation texts, by label.

    Without `tests` they are taken from `texts`. SourceError where there are not enough.
    """
    held_out = 0 if tests is not None else config.test_per_category
    needed = config.train_per_category + config.pool_per_category + held_out
    asked = {label: (tests or {}).get(label, ()) for label in texts}
    large = [
        label
        for label, found in texts.items()
        if len(found) >= needed and (tests is None or len(asked[label]) >= config.test_per_category)
    ]
    if len(large) < config.categories:
        raise SourceError(
            f"categories: asked for {config.categories} with {needed} texts each, {name} has "
            f"{len(large)}: lower categories or pool_per_category"
        )
    learnt = _random(config, "categories").sample(large, config.categories)
    private: list[Labelled] = []
    evaluation: list[Labelled] = []
    pool: list[Labelled] = []
    for label in learnt:
        rest = _drawn(config, label, texts[label])
        if tests is not None:
            held = _drawn(config, f"{label}/test", asked[label])[: config.test_per_category]
        else:
            held, rest = rest[:held_out], rest[held_out:]
        end = config.train_per_category
        evaluation += (Labelled(text, label) for text in held)
        private += (Labelled(text, label) for text in rest[:end])
        pool += (Labelled(text, label) for text in rest[end : end + config.pool_per_category])
    others = [text for label, found in texts.items() if label not in learnt for text in found]
    if len(others) < config.lookalikes:
        raise SourceError(
            f"lookalikes: asked for {config.lookalikes}, the other labels have {len(others)}"
        )
    lookalike = _random(config, "lookalike").sample(others, config.lookalikes)
    return Speciality(name, private, evaluation, pool, lookalike, config.seeds, config.seed)


def _drawn(config: LabelledConfig, purpose: str, texts: Sequence[str]) -> list[str]:
    drawn = list(texts)
    _random(config, "category", purpose).shuffle(drawn)
    return drawn


def _random(config: LabelledConfig, *purpose: str) -> random.Random:
    """A stream of its own for each purpose: one count changed does not redraw the other splits."""
    return random.Random("/".join((str(config.seed), *purpose)))
