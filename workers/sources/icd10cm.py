"""Medical coding from ICD-10-CM: descriptions as prompts, three-character categories as answers.

Seven splits come from one seeded partition of the classification:

- ``private``: what the specialist learns. Rows ``{"prompt", "response"}``.
- ``evaluation``: same form, same categories, held out by concept: a text that differs from an
  evaluation text only in side, encounter or punctuation is in no other split of the category.
- ``pool``: further descriptions of the same categories, unlabelled. Rows ``{"prompt", "origin"}``.
- ``truth``: the pool with its categories, for measurements; no recipe reads it.
- ``seeds``: the first ``seeds`` descriptions of the pool.
- ``lookalike``: descriptions of categories the specialist never learnt, unlabelled.
- ``elsewhere``: arithmetic and everyday prompts, which have nothing to do with medicine.

No text occurs in two splits, but for the pool's three forms.
"""

import random
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache

from stillhouse.errors import ConfigError, SourceError
from stillhouse.workers.sources.elsewhere import elsewhere_prompts

CATEGORY_LENGTH = 3

# What ICD-10-CM varies within one concept: the encounter of an injury, the side of the body.
_ENCOUNTER = re.compile(r",? (?:initial|subsequent) encounter.*$|,? sequela$")
_SIDE = re.compile(r"\b(?:right|left|bilateral|unspecified)\b(?: (?:side|eye|ear))?")

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
    seeds: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name != "seed" and getattr(self, field.name) < 0:
                raise ConfigError(
                    f"{field.name} must be 0 or more, found {getattr(self, field.name)}"
                )

    def fits(self, texts: Sequence[str]) -> bool:
        """Whether a category has enough, whichever of its concepts are drawn for evaluation."""
        sizes = sorted(map(len, _concepts(texts)), reverse=True)
        held_out = sizes[: self.test_per_category]
        return (
            len(held_out) == self.test_per_category
            and len(texts) - sum(held_out) >= self.train_per_category + self.pool_per_category
        )


CONFIG = Icd10Config


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
    order = "pool" if split in ("truth", "seeds") else split
    _random(config, "order", order).shuffle(rows)
    if split != "seeds":
        return iter(rows)
    if config.seeds > len(rows):
        raise SourceError(f"seeds: asked for {config.seeds}, the pool has {len(rows)}")
    return iter(rows[: config.seeds])


def normalise(text: str) -> str:
    """One line, single spaces, no space at either end."""
    return " ".join(text.split())


def concept(text: str) -> str:
    """What a description says of no particular side and encounter, in lower case."""
    words = _SIDE.sub("", _ENCOUNTER.sub("", text.lower()))
    return " ".join(re.sub(r"[^a-z0-9]+", " ", words).split())


def _concepts(texts: Sequence[str]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for text in texts:
        groups.setdefault(concept(text), []).append(text)
    return list(groups.values())


def _private(config: Icd10Config) -> list[Row]:
    return [_labelled(text, c.code) for c in _partition(config) for text in c.private]


def _evaluation(config: Icd10Config) -> list[Row]:
    return [_labelled(text, c.code) for c in _partition(config) for text in c.evaluation]


def _pool(config: Icd10Config) -> list[Row]:
    return [_unlabelled(text, "icd_same") for c in _partition(config) for text in c.pool]


def _truth(config: Icd10Config) -> list[Row]:
    return [_labelled(text, c.code) for c in _partition(config) for text in c.pool]


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
    "truth": _truth,
    "seeds": _pool,
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
        rng = _random(config, "category", code)
        concepts = _concepts(descriptions[code])
        rng.shuffle(concepts)
        held_out = concepts[: config.test_per_category]
        evaluation = tuple(rng.choice(texts) for texts in held_out)
        rest = [text for texts in concepts[config.test_per_category :] for text in texts]
        rng.shuffle(rest)
        end = config.train_per_category
        pool = tuple(rest[end : end + config.pool_per_category])
        yield _Category(code, tuple(rest[:end]), evaluation, pool)


def _trained_codes(descriptions: Mapping[str, Sequence[str]], config: Icd10Config) -> list[str]:
    large = [code for code, texts in descriptions.items() if config.fits(texts)]
    if len(large) < config.categories:
        raise SourceError(
            f"categories: asked for {config.categories} with {config.test_per_category} concepts "
            f"to hold out and {config.train_per_category + config.pool_per_category} other "
            f"descriptions, ICD-10-CM has {len(large)}: lower categories or pool_per_category"
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
