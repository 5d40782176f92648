"""Fit a compressed key/value cache to the student and measure what it costs."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

from stillhouse.configs.base import keyed_values
from stillhouse.configs.recipe import RecipeConfig
from stillhouse.pipelines.answering import answer_questions, summary
from stillhouse.pipelines.stage import Outcome, Part, Stage, Task
from stillhouse.pipelines.stage_run import StageRun
from stillhouse.pipelines.text import render
from stillhouse.storage.manifest import Counts
from stillhouse.storage.records import CacheMeasureRecord, QuestionRecord
from stillhouse.workers.protocols import CacheBytes, CacheMeasure, Failed

ARM = "student_compressed"


class CompressStage(Stage):
    """`cache_measures`, and the arm that answers on the compressed cache."""

    name: ClassVar[str] = "compress"
    after: ClassVar[tuple[str, ...]] = ("ingest", "distill", "evaluate")

    def settings(self, recipe: RecipeConfig) -> dict[str, Any]:
        evaluate = recipe.evaluate
        decoding = {"max_new_tokens": evaluate.max_new_tokens, "stop": evaluate.stop}
        return keyed_values(recipe.compress) | decoding

    def model_refs(self, recipe: RecipeConfig) -> tuple[str, ...]:
        return (recipe.models.target,)

    def waves(self, run: StageRun) -> Iterator[Sequence[Task]]:
        files = run.files("ingest", "questions")
        yield [Task("measure", tuple(files))]
        yield [Task(f"{ARM}-{index:05d}", (file,)) for index, file in enumerate(files)]

    def work(self, task: Task, run: StageRun) -> Iterator[Part]:
        questions = [row for row in run.rows(task.inputs, QuestionRecord) if row.status == "kept"]
        if task.name == "measure":
            yield _measure(run, questions[: run.recipe.compress.texts])
        else:
            yield answer_questions(run, ARM, run.student, questions, run.recipe.compress)

    def finish(self, run: StageRun) -> Outcome:
        from stillhouse.storage.shards import hash_artifact

        with run.catalog() as catalog:
            arm = summary(catalog, ARM)
            [row] = catalog.rows(
                "SELECT sum(kl_mean * tokens) / sum(tokens), max(kl_max), "
                "sum(logp_full) / sum(tokens), sum(logp_compressed) / sum(tokens), sum(tokens) "
                "FROM cache_measures WHERE status = 'kept'"
            )
        kl_mean, kl_max, full, compressed, tokens = row
        size = run.directory / "cache_bytes.json"
        cache = _read_bytes(run) | {
            "kl_mean": kl_mean,
            "kl_max": kl_max,
            "perplexity_change": math.expm1(full - compressed),
            "tokens": tokens,
        }
        limit = run.recipe.compress.max_kl
        refused = limit is not None and not kl_mean <= limit
        verdict = f"kl_mean {kl_mean:.4f} is over max_kl {limit}" if refused else None
        for name, value in cache.items():
            run.observer.metric(self.name, name, float(value), 0)
        facts = {"arm": arm, "cache": cache, "refused": verdict}
        return Outcome((hash_artifact(run.folder, size),), facts)


def _measure(run: StageRun, questions: Sequence[QuestionRecord]) -> Part:
    template = run.recipe.data.template.response
    texts = [item.rendered + render(template, item.reference) for item in questions]
    measures, size = run.workers.measure_cache(run.student, texts, run.recipe.compress)
    _write_bytes(run, size)
    rows = [
        _record(question.question_id, measure)
        for question, measure in zip(questions, measures, strict=True)
    ]
    failed = sum(row.status == "failed" for row in rows)
    counts = Counts(rows_in=len(rows), kept=len(rows) - failed, failed=failed)
    return Part({"cache_measures": rows}, counts, sum(row.tokens for row in rows))


def _record(text_id: str, measure: CacheMeasure | Failed) -> CacheMeasureRecord:
    if isinstance(measure, Failed):
        return CacheMeasureRecord(text_id, 0, None, None, None, None, "failed", measure.reason)
    return CacheMeasureRecord(text_id=text_id, status="kept", reason=None, **asdict(measure))


def _write_bytes(run: StageRun, size: CacheBytes) -> None:
    import json

    path = run.directory / "cache_bytes.json"
    path.write_text(json.dumps(asdict(size), sort_keys=True), encoding="utf-8")


def _read_bytes(run: StageRun) -> dict[str, float]:
    import json

    values = json.loads((run.directory / "cache_bytes.json").read_text(encoding="utf-8"))
    return {
        "bytes_per_token": values["bytes_per_token"],
        "bytes_per_token_16bit": values["bytes_per_token_16bit"],
    }
