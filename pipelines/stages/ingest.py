"""Read every source once: normalise, set aside what is malformed or too long, drop duplicates.

Two waves, so that nothing grows with the number of prompts: rows are read and measured source by
source (`raw`), then DuckDB finds the first of each text and `prompts` and `questions` are written.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from stillhouse.configs.base import keyed_values
from stillhouse.configs.data import PairsConfig, PoolConfig, SourceConfig
from stillhouse.configs.recipe import RecipeConfig
from stillhouse.errors import SourceError
from stillhouse.pipelines.hints import malformed_note, query_hint
from stillhouse.pipelines.raw_rows import mark_too_long, prompts_of, raw_counts
from stillhouse.pipelines.stage import Outcome, Part, Stage, Task
from stillhouse.pipelines.stage_run import StageRun
from stillhouse.pipelines.text import chunked, normalise, render
from stillhouse.storage.manifest import Counts
from stillhouse.storage.records import QuestionRecord, RawRecord, Status, content_id
from stillhouse.workers.sources.reader import MalformedRow, SourceRow, read

Kind = Literal["seed", "pool", "control", "question"]

# A prompt that equals a question is a leak, whatever the order in which the two were read.
FIRST_OF_EACH = """
SELECT kind, source, row, text, rendered, origin, reference, parent_id, locator,
       CASE WHEN status <> 'kept' THEN status WHEN duplicate THEN 'rejected' ELSE 'kept' END
           AS status,
       CASE WHEN status <> 'kept' THEN reason WHEN leak THEN 'overlaps_evaluation'
            WHEN duplicate THEN 'duplicate' END AS reason
FROM (
    SELECT *,
        status = 'kept' AND row_number() OVER (
            PARTITION BY text, status = 'kept'
            ORDER BY kind = 'question' DESC, source, row) > 1 AS duplicate,
        kind <> 'question' AND bool_or(kind = 'question' AND status = 'kept')
            OVER (PARTITION BY text) AS leak
    FROM raw
) WHERE (kind = 'question') = ?
ORDER BY source, row
"""


class IngestStage(Stage):
    """`prompts` and `questions` from the recipe's sources."""

    name: ClassVar[str] = "ingest"
    version: ClassVar[int] = 2

    def settings(self, recipe: RecipeConfig) -> dict[str, Any]:
        values = keyed_values(recipe.data)
        del values["private"]
        return values

    def model_refs(self, recipe: RecipeConfig) -> tuple[str, ...]:
        return (recipe.models.base, recipe.models.target)  # their tokenizers say what is too long

    def data_refs(self, recipe: RecipeConfig) -> tuple[str, ...]:
        return tuple(source.ref for source in _sources(recipe))

    def waves(self, run: StageRun) -> Iterator[Sequence[Task]]:
        count = len(_sources(run.recipe))
        yield [Task(f"read-{index:03d}", arguments={"source": index}) for index in range(count)]
        yield [Task("prompts"), Task("questions")]

    def work(self, task: Task, run: StageRun) -> Iterator[Part]:
        if task.name == "prompts":
            yield from _prompts(run)
        elif task.name == "questions":
            yield from _questions(run)
        else:
            yield from _read(run, int(task.arguments["source"]))

    def rows_due(self, run: StageRun) -> int:
        return sum(file.rows for file in run.files(self.name, "raw"))

    def finish(self, run: StageRun) -> Outcome:
        with run.catalog() as catalog:
            by_origin = catalog.rows(
                "SELECT origin, count(*), count(*) FILTER (status = 'kept') FROM prompts "
                "GROUP BY origin ORDER BY origin"
            )
            malformed = catalog.rows(
                "SELECT count(*) OVER (), locator, reason FROM raw WHERE status = 'failed' "
                "ORDER BY source, row LIMIT 1"
            )
            [(prompts, candidates)] = catalog.rows(
                "SELECT count(*), count(*) FILTER (role <> 'control') FROM prompts "
                "WHERE status = 'kept'"
            )
            [(questions,)] = catalog.rows("SELECT count(*) FROM questions WHERE status = 'kept'")
        for count, locator, reason in malformed:
            run.observer.note(malformed_note(run, count, locator, reason, "raw"))
        if not candidates or not questions:
            empty = "the seeds and the pool" if not candidates else "the questions"
            raise SourceError(
                f"ingest: expected at least one usable row in {empty}, found none; look at "
                + query_hint(run, "SELECT reason, count(*) FROM raw GROUP BY 1")
            )
        origins = {origin: {"rows": rows, "kept": kept} for origin, rows, kept in by_origin}
        return Outcome(facts={"prompts": prompts, "questions": questions, "origins": origins})


def _kinds(recipe: RecipeConfig) -> Iterator[tuple[Kind, SourceConfig]]:
    """Every source: of equal prompts the first counts, so one named as a control is never kept."""
    data = recipe.data
    yield from (("seed", source) for source in data.seeds)
    yield from (("control", source) for source in data.controls)
    yield from (("pool", source) for source in data.pool)
    yield "question", data.questions


def _sources(recipe: RecipeConfig) -> tuple[SourceConfig, ...]:
    return tuple(source for _, source in _kinds(recipe))


def _read(run: StageRun, index: int) -> Iterator[Part]:
    kind, source = list(_kinds(run.recipe))[index]
    rows = enumerate(read(source.ref, Path.cwd(), _columns(source)))
    for part, chunk in enumerate(chunked(_limited(rows, source.limit), run.recipe.data.shard_rows)):
        raw = [_raw(run.recipe, kind, source, index, number, row) for number, row in chunk]
        yield Part({"raw": mark_too_long(run, raw)}, Counts(), part=part)


def _limited(
    rows: Iterator[tuple[int, SourceRow | MalformedRow]], limit: int | None
) -> Iterator[tuple[int, SourceRow | MalformedRow]]:
    for number, row in rows:
        if limit is not None and number >= limit:
            return
        yield number, row


def _raw(
    recipe: RecipeConfig,
    kind: Kind,
    source: SourceConfig,
    index: int,
    number: int,
    row: SourceRow | MalformedRow,
) -> RawRecord:
    origin = (source.origin if isinstance(source, PoolConfig) else None) or kind
    text, reference, reason = "", None, None
    if isinstance(row, MalformedRow):
        reason = f"malformed: {row.reason}"
    else:
        text = normalise(row.values[source.prompt])
        if isinstance(source, PoolConfig) and source.origin_column:
            origin = row.values[source.origin_column]
        if isinstance(source, PairsConfig):
            reference = row.values[source.response].strip()
        reason = "empty_reference" if reference == "" else None if text else "empty"
    bare = isinstance(source, PoolConfig) and source.template == "none"
    return RawRecord(
        kind=kind,
        source=index,
        row=number,
        text=text,
        rendered=text if bare else render(recipe.data.template.prompt, text),
        origin=origin,
        reference=reference,
        parent_id=None,
        locator=row.locator,
        status=_status(row, reason),
        reason=reason,
    )


def _status(row: SourceRow | MalformedRow, reason: str | None) -> Status:
    if isinstance(row, MalformedRow):
        return "failed"
    return "kept" if reason is None else "rejected"


def _columns(source: SourceConfig) -> list[str]:
    origin = source.origin_column if isinstance(source, PoolConfig) else None
    response = source.response if isinstance(source, PairsConfig) else None
    return [name for name in (source.prompt, origin, response) if name is not None]


def _prompts(run: StageRun) -> Iterator[Part]:
    for part, rows in enumerate(_judged(run, questions=False)):
        prompts = prompts_of(rows, 0, run.recipe.data.heldout_percent)
        yield Part({"prompts": prompts}, raw_counts(rows), part=part)


def _questions(run: StageRun) -> Iterator[Part]:
    for part, rows in enumerate(_judged(run, questions=True)):
        questions = [
            QuestionRecord(
                question_id=content_id("question", _identity(row)),
                text=row.text,
                rendered=row.rendered,
                reference=row.reference or "",
                locator=row.locator,
                status=row.status,
                reason=row.reason,
            )
            for row in rows
        ]
        yield Part({"questions": questions}, raw_counts(rows), part=part)


def _judged(run: StageRun, *, questions: bool) -> Iterator[list[RawRecord]]:
    with run.catalog() as catalog:
        size = run.recipe.data.shard_rows
        yield from chunked(catalog.records(FIRST_OF_EACH, RawRecord, size, [questions]), size)


def _identity(row: RawRecord) -> str:
    return row.text if row.status == "kept" else row.locator
