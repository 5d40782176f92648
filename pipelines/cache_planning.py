"""How large a model's key/value cache would be, from its configuration alone."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stillhouse.configs.recipe import RecipeConfig
from stillhouse.errors import ConfigError
from stillhouse.pipelines.stages.compress import MOST_FITTED_BITS, MOST_SINGLE_BITS
from stillhouse.workers.models.cache_shape import CacheShape, read_cache_shape
from stillhouse.workers.models.cache_size import (
    CacheSize,
    cache_size,
    stored_format,
    value_maps,
)

GIB, GB = 2**30, 10**9
FORMATS: tuple[str, ...] = ("bf16", "fp8", "k4v4", "k3v3")


@dataclass(frozen=True, slots=True)
class CacheQuestion:
    """What is asked: no contexts means the one that the model was made for."""

    contexts: tuple[int, ...] = ()
    batch: int = 1
    formats: tuple[str, ...] = FORMATS
    sinks: int = 0
    recent: int = 0


@dataclass(frozen=True, slots=True)
class CacheRow:
    """One context in one format; `ratio`: how many times smaller than 16 bits.

    value_maps: bytes of tables besides, where a fitted cache's values cannot be folded.
    """

    context: int
    format: str
    size: CacheSize
    bytes_per_token: float
    ratio: float
    value_maps: int

    @property
    def gib(self) -> float:
        """Units of 2^30 bytes, in which memory is sold."""
        return self.size.total / GIB

    @property
    def gb(self) -> float:
        """Units of 10^9 bytes."""
        return self.size.total / GB


@dataclass(frozen=True, slots=True)
class CachePlan:
    """The sizes of one model's cache."""

    shape: CacheShape
    question: CacheQuestion
    rows: tuple[CacheRow, ...]

    def as_json(self) -> dict[str, Any]:
        """For programs: the question, the layers, a row a size."""
        rows = [
            {
                "context": row.context,
                "format": row.format,
                "bytes": row.size.total,
                "gib": row.gib,
                "gb": row.gb,
                "bytes_per_token": row.bytes_per_token,
                "ratio": row.ratio,
                "parts": asdict(row.size),
                "value_maps": row.value_maps,
            }
            for row in self.rows
        ]
        asked = asdict(self.question)
        layers = [asdict(layer) for layer in self.shape.layers]
        names = ("batch", "sinks", "recent")
        head = {"model": self.shape.name, **{name: asked[name] for name in names}}
        return {**head, "layers": layers, "rows": rows}


def plan_cache(ref: str, question: CacheQuestion) -> CachePlan:
    """Return the size of a model's cache for every context and format asked for.

    ModelError as `read_cache_shape`; ConfigError for an unknown format, or no context to take.
    """
    forms = [stored_format(name) for name in question.formats]
    shape = read_cache_shape(ref)
    contexts = question.contexts or _own_context(shape)
    rows = []
    for context in contexts:
        full = cache_size(shape, stored_format("bf16"), context, question.batch).total
        for form in forms:
            size = cache_size(shape, form, context, question.batch, question.sinks, question.recent)
            each = size.total / (context * question.batch)
            maps = value_maps(shape, form)
            rows.append(CacheRow(context, form.name, size, each, full / size.total, maps))
    return CachePlan(shape, question, tuple(rows))


def recipe_format(recipe: RecipeConfig) -> str:
    """The format of a recipe's compressed cache; with `budget_kl` the largest it may take."""
    config = recipe.compress
    if not config.calibrate or max(config.key_bits, config.value_bits) > MOST_FITTED_BITS:
        return f"k{config.key_bits}v{config.value_bits}"
    most = MOST_SINGLE_BITS if config.channel_groups == 1 else MOST_FITTED_BITS
    bits = (config.key_bits + config.value_bits) / 2
    return f"fitted:{bits if config.budget_kl is None else most:g}"


def plan_target_cache(recipe: RecipeConfig) -> CachePlan:
    """The target's cache at its own context, in 16 bits and in the recipe's format."""
    question = ask_cache(recipe, (), ("bf16", recipe_format(recipe)))
    return plan_cache(recipe.models.target, question)


def ask_cache(
    recipe: RecipeConfig | None,
    contexts: Sequence[str],
    formats: Sequence[str],
    batch: int = 1,
    sinks: int | None = None,
    recent: int | None = None,
) -> CacheQuestion:
    """The question that a command line asks; None: windows as the recipe has them, else none.

    ConfigError for a context that is no number.
    """
    usual = FORMATS
    if recipe is not None:
        usual = (*FORMATS, recipe_format(recipe))
        sinks = recipe.compress.sinks if sinks is None else sinks
        recent = recipe.compress.recent if recent is None else recent
    return CacheQuestion(
        contexts=tuple(_tokens(word) for word in _words(contexts)),
        batch=batch,
        formats=_words(formats or usual),
        sinks=sinks or 0,
        recent=recent or 0,
    )


def write_cache_plan(plan: CachePlan, path: Path) -> None:
    """Write the sizes as JSON; ConfigError where the file cannot be written."""
    try:
        path.write_text(json.dumps(plan.as_json(), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--json: expected a file that can be written, found {error}. Name another"
        ) from error


def _tokens(word: str) -> int:
    if not re.fullmatch(r"0*[1-9][0-9]{0,17}", word):
        raise ConfigError(f"--context: expected whole numbers from 1 (131072), found {word!r:.60}")
    return int(word)


def _words(texts: Sequence[str]) -> tuple[str, ...]:
    """The words of an option that is given several times or with commas, each once, in order."""
    split = (word.strip() for text in texts for word in text.split(","))
    return tuple(dict.fromkeys(word for word in split if word))


def _own_context(shape: CacheShape) -> tuple[int, ...]:
    if shape.context is None:
        raise ConfigError(
            f"{shape.name}: expected max_position_embeddings in its configuration, found none. "
            "Give --context"
        )
    return (shape.context,)
