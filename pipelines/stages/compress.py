"""Fit a compressed key/value cache to the student and measure what it costs."""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from stillhouse.configs.base import keyed_values
from stillhouse.configs.recipe import RecipeConfig
from stillhouse.errors import ModelError
from stillhouse.pipelines.answering import answer_questions, summary
from stillhouse.pipelines.stage import Outcome, Part, Stage, Task
from stillhouse.pipelines.stage_run import StageRun
from stillhouse.pipelines.text import render
from stillhouse.storage.manifest import Counts
from stillhouse.storage.records import CacheMeasureRecord, CorpusRecord, QuestionRecord
from stillhouse.workers.protocols import (
    NOT_STORABLE,
    CacheBytes,
    CacheMeasure,
    CacheSpec,
    CalibrateJob,
    Failed,
)

ARM = "student_compressed"
MOST_FITTED_BITS, MOST_SINGLE_BITS = 5, 4  # of a channel; in one channel group
FIGURE_NAMES = (
    "kl_mean",
    "kl_max",
    "perplexity_change",
    "bytes_per_token",
    "bytes_per_token_16bit",
    "table_bytes",
    "tokens",
)
FIGURES = """
SELECT fsum(kl_mean * tokens) / sum(tokens), max(kl_max),
    exp((fsum(logp_full) - fsum(logp_compressed)) / sum(tokens)) - 1,
    max(bytes_per_token), max(bytes_per_token_16bit), max(table_bytes), sum(tokens)::BIGINT
FROM cache_measures WHERE status = 'kept'
"""
LOST = """
SELECT count(*) FILTER (starts_with(reason, ?)), count(*) FROM cache_measures
"""


class CompressStage(Stage):
    """`cache_measures`, and the arm that answers on the compressed cache."""

    name: ClassVar[str] = "compress"
    version: ClassVar[int] = 2
    after: ClassVar[tuple[str, ...]] = ("ingest", "curate", "distill")

    def settings(self, recipe: RecipeConfig) -> dict[str, Any]:
        evaluate = recipe.evaluate
        decoding = {"max_new_tokens": evaluate.max_new_tokens, "stop": evaluate.stop}
        return keyed_values(recipe.compress) | decoding

    def model_refs(self, recipe: RecipeConfig) -> tuple[str, ...]:
        return (recipe.models.target,)

    def waves(self, run: StageRun) -> Iterator[Sequence[Task]]:
        files = run.files("ingest", "questions")
        corpus = tuple(run.files("curate", "corpus"))
        if _calibrates(run):
            yield [Task("calibrate", corpus)]
        yield [Task("measure", corpus)]
        yield [Task(f"{ARM}-{index:05d}", (file,)) for index, file in enumerate(files)]

    def tasks_due(self, run: StageRun) -> int:
        return _calibrates(run) + 1 + len(run.files("ingest", "questions"))

    def work(self, task: Task, run: StageRun) -> Iterator[Part]:
        if task.name == "calibrate":
            yield _calibrate(run, task)
            return
        if task.name == "measure":
            yield _measure(run, _heldout(run, task))
            return
        questions = [row for row in run.rows(task.inputs, QuestionRecord) if row.status == "kept"]
        yield answer_questions(run, ARM, run.student, questions, _cache(run))

    def finish(self, run: StageRun) -> Outcome:
        with run.catalog() as catalog:
            arm = summary(catalog, ARM)
            [row] = catalog.rows(FIGURES)
            [(lost, texts)] = catalog.rows(LOST, [NOT_STORABLE])
        if row[0] is None:
            raise ModelError(
                "compress: expected next-token divergence on held-out texts, found none that could "
                "be measured; see `SELECT reason FROM cache_measures`"
            )
        cache = dict(zip(FIGURE_NAMES, row, strict=True))
        verdict = _verdict(run.recipe.compress.max_kl, cache["kl_mean"], lost, texts)
        for name, value in cache.items():
            run.observer.metric(self.name, name, float(value), 0)
        facts: dict[str, Any] = {"arm": arm, "cache": cache, "refused": verdict, "plan": None}
        if not _calibrates(run):
            return Outcome(facts=facts)
        folder = _plan_folder(run)
        facts["plan"] = {"folder": run.folder.relative(folder)} | _plan_facts(folder)
        from stillhouse.storage.shards import hash_artifacts

        return Outcome(hash_artifacts(run.folder, folder), facts)


def _verdict(limit: float | None, kl_mean: float, lost: int, texts: int) -> str | None:
    """Why the cache is refused; None when it is not."""
    if lost:
        return (
            f"{lost} of {texts} texts have keys or values that the cache cannot store; see "
            "`SELECT reason FROM cache_measures`"
        )
    if limit is not None and not kl_mean <= limit:
        return f"kl_mean {kl_mean:.4f} is over max_kl {limit}"
    return None


def _calibrates(run: StageRun) -> bool:
    """Whether the cache is fitted to the student: asked for, possible, and there is a corpus."""
    config = run.recipe.compress
    return (
        config.calibrate
        and max(config.key_bits, config.value_bits) <= MOST_FITTED_BITS
        and bool(run.facts("curate")["rows"].get("train", 0))
    )


def _plan_folder(run: StageRun) -> Path:
    return run.directory / "cache_plan"


def _plan_facts(folder: Path) -> dict[str, Any]:
    """What the calibration says of itself."""
    facts: dict[str, Any] = json.loads((folder / "cache_plan.json").read_bytes())["facts"]
    return facts


def _cache(run: StageRun) -> CacheSpec:
    return CacheSpec(run.recipe.compress, _plan_folder(run) if _calibrates(run) else None)


def _calibrate(run: StageRun, task: Task) -> Part:
    rows = run.rows(task.inputs, CorpusRecord)
    texts = [
        row.prompt + row.response for row in rows if row.status == "kept" and row.split == "train"
    ]
    job = CalibrateJob(run.student, texts, run.recipe.compress, _plan_folder(run))
    return Part({}, Counts(), run.workers.calibrate(job))


def _heldout(run: StageRun, task: Task) -> list[tuple[str, str]]:
    """Ids and texts that the student was not trained on: the corpus' held-out part, else questions.

    The first ones by place: pool prompts before those of later rounds, each by id, which is a hash.
    """
    limit = run.recipe.compress.texts
    rows = run.rows(task.inputs, CorpusRecord)
    heldout = (row for row in rows if row.status == "kept" and row.split == "heldout")
    texts = [(row.example_id, row.prompt + row.response) for row in islice(heldout, limit)]
    if texts:
        return texts
    template = run.recipe.data.template.response
    asked = run.rows(run.files("ingest", "questions"), QuestionRecord)
    kept = islice((row for row in asked if row.status == "kept"), limit)
    return [(row.question_id, row.rendered + render(template, row.reference)) for row in kept]


def _measure(run: StageRun, heldout: Sequence[tuple[str, str]]) -> Part:
    texts = [text for _, text in heldout]
    measures, size = run.workers.measure_cache(run.student, texts, _cache(run))
    rows = [
        _record(text_id, measure, size)
        for (text_id, _), measure in zip(heldout, measures, strict=True)
    ]
    failed = sum(row.status == "failed" for row in rows)
    counts = Counts(rows_in=len(rows), kept=len(rows) - failed, failed=failed)
    return Part({"cache_measures": rows}, counts, sum(row.tokens for row in rows))


def _record(text_id: str, measure: CacheMeasure | Failed, size: CacheBytes) -> CacheMeasureRecord:
    found = None if isinstance(measure, Failed) else measure
    return CacheMeasureRecord(
        text_id=text_id,
        tokens=found.tokens if found else 0,
        kl_mean=found.kl_mean if found else None,
        kl_max=found.kl_max if found else None,
        logp_full=found.logp_full if found else None,
        logp_compressed=found.logp_compressed if found else None,
        bytes_per_token=size.bytes_per_token,
        bytes_per_token_16bit=size.bytes_per_token_16bit,
        table_bytes=size.table_bytes,
        status="kept" if found else "failed",
        reason=measure.reason if isinstance(measure, Failed) else None,
    )
