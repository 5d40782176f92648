"""What a stage would cost: rows, tokens, time, bytes. Estimates, and printed as such.

A stage that the last start finished is taken to cost the same again, scaled by what is reckoned for
then and for now: a forward pass takes about 2 floating-point operations a parameter and token, LoRA
training about 5 (frozen weights need no gradient of their own).
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from stillhouse.configs.data import SourceConfig
from stillhouse.configs.recipe import RecipeConfig
from stillhouse.configs.stages import TrainConfig
from stillhouse.pipelines.last_start import LastStart
from stillhouse.storage.manifest import Manifest
from stillhouse.workers.models.refs import is_here
from stillhouse.workers.models.size import parameters
from stillhouse.workers.sources.reader import read

FLOPS_PER_CORE = 70e9  # SmolLM2-135M runs 270 tokens/s forward on one core
PROMPT_TOKENS = 30
ANSWER_TOKENS = 5
ROW_BYTES = 300  # a Parquet row of text, ids and a few log-probabilities
MOST_ROWS = 1_000_000  # counted; a larger source is taken to have this many


@dataclass(frozen=True, slots=True)
class Estimate:
    """Rows in, tokens through a model, seconds on this machine, bytes written.

    Seconds and bytes are NaN where a model is not on this machine yet.
    """

    rows: int
    tokens: int
    seconds: float
    bytes: float


def estimate(
    recipe: RecipeConfig, manifest: Manifest, keys: Mapping[str, str], last: LastStart | None
) -> dict[str, Estimate]:
    """Return the cost of each stage that is not finished."""
    due = [stage for stage, key in keys.items() if manifest.stage(stage, key) is None]
    if not due:
        return {}
    costs = _fresh(recipe)
    if last is None:
        return {stage: costs[stage] for stage in due}
    then = _fresh(last.recipe)
    return {stage: _scaled(manifest, last, stage, then, costs[stage]) for stage in due}


def _scaled(
    manifest: Manifest, last: LastStart, stage: str, then: Mapping[str, Estimate], now: Estimate
) -> Estimate:
    """What the stage cost in the last start, by as much more as its estimate is more."""
    former = manifest.stage(stage, last.keys.get(stage, ""))
    if former is None:
        return now
    before = then[stage]
    shards = manifest.shards(former.stage, former.key).values()
    size = sum(file.bytes for shard in shards for file in shard.files)
    size += sum(file.bytes for file in former.files)
    return Estimate(
        rows=round(former.counts.rows_in * _ratio(now.rows, before.rows)),
        tokens=round(former.tokens * _ratio(now.tokens, before.tokens)),
        seconds=former.seconds * _ratio(now.seconds, before.seconds),
        bytes=size * _ratio(now.bytes, before.bytes),
    )


def _ratio(now: float, before: float) -> float:
    """1 where the estimates say nothing: both 0, or a size unknown."""
    return now / before if before and not math.isnan(now / before) else 1.0


def _fresh(recipe: RecipeConfig) -> dict[str, Estimate]:
    pool = sum(_count(source) for source in (*recipe.data.seeds, *recipe.data.pool))
    prompts = pool + sum(_count(source) for source in recipe.data.controls)
    passes = 3 + recipe.score.target  # answer, specialist, base, and what the target thinks
    questions = _count(recipe.data.questions)
    private = 0 if recipe.data.private is None else _count(recipe.data.private)
    made = recipe.expand.rounds * recipe.expand.prompts_per_round
    corpus = min(pool, recipe.select.budget or pool) + made
    base = _size(recipe.models.specialist or recipe.models.base)
    target = _size(recipe.models.target)
    pair = PROMPT_TOKENS + ANSWER_TOKENS
    listed = recipe.expand.shots * PROMPT_TOKENS
    asked = questions * len(recipe.evaluate.arms)
    fitted = 3 * recipe.compress.calibration_tokens * recipe.compress.calibrate  # and back
    served = min(questions, recipe.deploy.questions)
    return {
        "ingest": _cost(prompts + questions, 0, 0),
        "specialize": _trained(private, base, recipe.specialize),
        "score": _cost(prompts, prompts * passes * pair, 2 * base),
        "select": _cost(prompts, 0, 0),
        "expand": _cost(made, made * (listed + passes * pair), 2 * base),
        "curate": _cost(corpus, 0, 0),
        "distill": _trained(corpus, target, recipe.distill),
        "evaluate": _cost(asked, asked * 2 * pair, base + target),
        "compress": _cost(questions, questions * 4 * pair + fitted, 2 * target),
        "deploy": _cost(served, served * pair, 2 * target, files=4 * target),
    }


def _size(ref: str) -> float:
    return parameters(ref) if is_here(ref) else math.nan


def _cost(rows: int, tokens: int, flops_per_token: float, files: float = 0) -> Estimate:
    cores = len(os.sched_getaffinity(0))
    seconds = tokens * flops_per_token / (cores * FLOPS_PER_CORE)
    return Estimate(rows, tokens, seconds, rows * ROW_BYTES + files)


def _trained(examples: int, size: float, config: TrainConfig) -> Estimate:
    tokens = examples * config.epochs * (PROMPT_TOKENS + ANSWER_TOKENS)
    return _cost(examples, tokens, 5 * size, files=size / 10)


def _count(source: SourceConfig) -> int:
    most = source.limit or MOST_ROWS
    return sum(1 for _ in islice(read(source.ref, Path.cwd()), most))
