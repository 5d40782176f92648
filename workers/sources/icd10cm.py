"""Medical coding from ICD-10-CM: descriptions as prompts, three-character categories as answers.

Five splits come from one seeded partition of the classification:

- ``private``: what the specialist learns. Rows ``{"prompt", "response"}``.
- ``evaluation``: same form, same categories, held out.
- ``pool``: further descriptions of the same categories, unlabelled. Rows ``{"prompt", "origin"}``.
- ``lookalike``: descriptions of categories the specialist never learnt, unlabelled.
- ``elsewhere``: arithmetic and everyday prompts, which have nothing to do with medicine.

No text occurs in two splits.
"""

import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache

from stillhouse.errors import ConfigError, SourceError
from stillhouse.workers.sources.elsewhere import elsewhere_prompts

CATEGORY_LENGTH = 3

Row = dict[str, str]


@dataclass(frozen=True, slots=True)
class Icd10Config:
    """Sizes of the splits; the ``*_per_category`` counts are exact, for each trained category."""

    categories: int
    pool_per_category: int
    lookalikes: int
    elsewhere: int
    train_per_category: int = 16
    test_per_category: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name != "seed" and getattr(self, field.name) < 0:
                raise ConfigError(
                    f"{field.name} must be 0 or more, found {getattr(self, field.name)}"
                )

    @property
    def per_category(self) -> int:
        """Descriptions one trained category has to offer."""
        return self.train_per_category + self.test_per_category + self.pool_per_category


@dataclass(frozen=True, slots=True)
class _Category:
    """One trained category and its descriptions, already divided."""

    code: str
    private: tuple[str, ...]
    evaluation: tuple[str, ...]
    pool: tuple[str, ...]


def build(split: str, config: Icd10Config) -> Iterator[Row]:
    """Yield the rows of one split, the same rows in the same order every time.

    Raises ConfigError for an unknown split, and SourceError when there are fewer categories or
    texts than asked for.
    """
    builder = _BUILDERS.get(split)
    if builder is None:
        raise ConfigError(f"unknown split {split!r}: expected one of {', '.join(_BUILDERS)}")
    rows = builder(config)
    # Shuffled, so that any prefix of a split is a sample of it and not one chapter of the book.
    _random(config, "order", split).shuffle(rows)
    return iter(rows)


def normalise(text: str) -> str:
    """One line, single spaces, no space at either end."""
    return " ".join(text.split())


def _private(config: Icd10Config) -> list[Row]:
    return [_labelled(text, c.code) for c in _partition(config) for text in c.private]


def _evaluation(config: Icd10Config) -> list[Row]:
    return [_labelled(text, c.code) for c in _partition(config) for text in c.evaluation]


def _pool(config: Icd10Config) -> list[Row]:
    return [_unlabelled(text, "icd_same") for c in _partition(config) for text in c.pool]


def _lookalike(config: Icd10Config) -> list[Row]:
    trained = {c.code for c in _partition(config)}
    texts = [
        text
        for code, descriptions in _descriptions().items()
        if code not in trained
        for text in descriptions
    ]
    if len(texts) < config.lookalikes:
        raise SourceError(
            f"lookalikes: asked for {config.lookalikes}, the untrained categories have {len(texts)}"
        )
    chosen = _random(config, "lookalike").sample(texts, config.lookalikes)
    return [_unlabelled(text, "icd_other") for text in chosen]


def _elsewhere(config: Icd10Config) -> list[Row]:
    rng = _random(config, "elsewhere")
    return [_unlabelled(text, origin) for origin, text in elsewhere_prompts(config.elsewhere, rng)]


_BUILDERS: Mapping[str, Callable[[Icd10Config], list[Row]]] = {
    "private": _private,
    "evaluation": _evaluation,
    "pool": _pool,
    "lookalike": _lookalike,
    "elsewhere": _elsewhere,
}


def _labelled(text: str, code: str) -> Row:
    return {"prompt": text, "response": code}


def _unlabelled(text: str, origin: str) -> Row:
    return {"prompt": text, "origin": origin}


def _random(config: Icd10Config, *purpose: str) -> random.Random:
    """A stream of its own for each purpose: one count changed does not redraw the other splits."""
    return random.Random("/".join((str(config.seed), *purpose)))


def _partition(config: Icd10Config) -> Iterator[_Category]:
    """Choose the trained categories and divide the descriptions of each."""
    descriptions = _descriptions()
    for code in _trained_codes(descriptions, config):
        texts = list(descriptions[code])
        _random(config, "category", code).shuffle(texts)
        test_start = config.train_per_category
        pool_start = test_start + config.test_per_category
        yield _Category(
            code=code,
            private=tuple(texts[:test_start]),
            evaluation=tuple(texts[test_start:pool_start]),
            pool=tuple(texts[pool_start : config.per_category]),
        )


def _trained_codes(descriptions: Mapping[str, Sequence[str]], config: Icd10Config) -> list[str]:
    large = [code for code, texts in descriptions.items() if len(texts) >= config.per_category]
    if len(large) < config.categories:
        raise SourceError(
            f"categories: asked for {config.categories} of {config.per_category} descriptions each"
            f", ICD-10-CM has {len(large)}: lower categories or pool_per_category"
        )
    return _random(config, "categories").sample(large, config.categories)


@cache
def _descriptions() -> Mapping[str, tuple[str, ...]]:
    """Category to its leaf descriptions, in code order; a repeated text is its first code's."""
    by_category: dict[str, list[str]] = {}
    seen: set[str] = set()
    for code, description in _leaves():
        text = normalise(description)
        if text not in seen:
            seen.add(text)
            by_category.setdefault(code[:CATEGORY_LENGTH], []).append(text)
    return {code: tuple(texts) for code, texts in by_category.items()}


def _leaves() -> Iterator[tuple[str, str]]:
    """Every code without children, undotted, and its description, in code order."""
    with warnings.catch_warnings():
        # The package reads its data through functions of importlib.resources deprecated in 3.11.
        warnings.filterwarnings("ignore", "(read|open)_text is deprecated", DeprecationWarning)
        # Here and not above: the import parses the whole classification, 1.3 s.
        import simple_icd_10_cm
    for code in simple_icd_10_cm.get_all_codes(with_dots=False):
        if simple_icd_10_cm.is_leaf(code):
            yield code, simple_icd_10_cm.get_description(code)
