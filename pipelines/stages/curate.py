"""The corpus: what selection kept, less near-duplicates, degenerate answers and leaks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from stillhouse.pipelines.evaluation_overlap import Questions
from stillhouse.pipelines.flaws import flaw_of
from stillhouse.pipelines.near_duplicates import sketch
from stillhouse.pipelines.personal_data import personal_data
from stillhouse.pipelines.stage import Outcome, Part, Stage, Task
from stillhouse.pipelines.stage_run import StageRun
from stillhouse.pipelines.text import chunked, render
from stillhouse.storage.manifest import Counts
from stillhouse.storage.records import CorpusRecord, Record, Split, content_id

CANDIDATES = """
SELECT prompts.text AS text, prompt_id FROM selections JOIN prompts USING (prompt_id)
WHERE selections.status = 'kept' AND prompts.status = 'kept' ORDER BY selections.round, prompt_id
"""
QUESTIONS = "SELECT text, question_id FROM questions WHERE status = 'kept' ORDER BY question_id"

# A text goes when an earlier one (by round, then id) is its near-duplicate, or when a question is,
# or has as much of it.
CORPUS = """
WITH candidates AS (
    SELECT prompts.*, completions.completion_id, completions.text AS answer,
        token_ids, token_ends, logp_specialist, logp_base, rouge_l,
        row_number() OVER (ORDER BY prompts.round, prompt_id) AS place
    FROM selections JOIN prompts USING (prompt_id)
    JOIN completions USING (completion_id) JOIN scores USING (completion_id)
    JOIN sketches ON sketches.text_id = prompts.prompt_id
    WHERE selections.status = 'kept' AND prompts.status = 'kept'
), banded AS (SELECT text_id, kind, unnest(bands) AS band FROM sketches
), pairs AS (
    SELECT DISTINCT a.text_id AS text_id, b.text_id AS other_id
    FROM banded a JOIN banded b ON a.band = b.band AND a.text_id <> b.text_id
    WHERE a.kind = 'candidate'
), near AS (
    SELECT pairs.text_id, other_id, two.kind AS other_kind
    FROM pairs JOIN sketches one ON one.text_id = pairs.text_id
    JOIN sketches two ON two.text_id = other_id
    WHERE len(list_intersect(one.shingles, two.shingles))
        >= $near * len(list_distinct(list_concat(one.shingles, two.shingles)))
), objections AS (
    SELECT near.text_id, bool_or(other_kind = 'question') AS leak,
        bool_or(other_kind = 'candidate' AND earlier.place < own.place) AS duplicate
    FROM near JOIN candidates own ON own.prompt_id = near.text_id
    LEFT JOIN candidates earlier ON earlier.prompt_id = near.other_id GROUP BY near.text_id
)
SELECT prompt_id, completion_id, text, rendered, answer, split, token_ids, token_ends,
    logp_specialist, logp_base,
    CASE WHEN leak OR rouge_l >= $overlap THEN 'overlaps_evaluation'
         WHEN duplicate THEN 'near_duplicate' END AS reason
FROM candidates LEFT JOIN objections ON objections.text_id = candidates.prompt_id ORDER BY place
"""


@dataclass(frozen=True, slots=True)
class _Candidate(Record):
    """A selected prompt and its answer; `reason`: what DuckDB has against it."""

    prompt_id: str
    completion_id: str
    text: str
    rendered: str
    answer: str
    split: Split
    token_ids: list[int]
    token_ends: list[int]
    logp_specialist: list[float]
    logp_base: list[float]
    reason: str | None


class CurateStage(Stage):
    """`corpus`: training examples, and the reason of each that is not one."""

    name: ClassVar[str] = "curate"
    version: ClassVar[int] = 2
    after: ClassVar[tuple[str, ...]] = ("ingest", "score", "select", "expand")

    def waves(self, run: StageRun) -> Iterator[Sequence[Task]]:
        yield [Task("candidates"), Task("questions")]
        yield [Task("examples")]

    def work(self, task: Task, run: StageRun) -> Iterator[Part]:
        match task.name:
            case "candidates":
                with run.catalog() as catalog:
                    asked = [(name, text) for text, name in catalog.rows(QUESTIONS)]
                yield from _sketches(run, "candidate", CANDIDATES, Questions.of(asked))
            case "questions":
                yield from _sketches(run, "question", QUESTIONS)
            case _:
                yield from _corpus(run)

    def rows_due(self, run: StageRun) -> int:
        return run.kept("select") + run.kept("expand")

    def finish(self, run: StageRun) -> Outcome:
        with run.catalog() as catalog:
            rows = catalog.rows(
                "SELECT coalesce(reason, split), count(*) FROM corpus GROUP BY ALL ORDER BY ALL"
            )
            personal = catalog.rows(
                "SELECT kind, count(*) FROM (SELECT unnest(personal_data) AS kind FROM corpus "
                "WHERE status = 'kept') GROUP BY ALL ORDER BY ALL"
            )
            [(like,)] = catalog.rows(
                "SELECT count(*) FILTER (rouge_l >= 0.7) FROM sketches WHERE kind = 'candidate'"
            )
        # TiTok's and Self-Instruct's bound beside the recipe's own, so that a report shows both.
        overlap = {"rouge_l_of_0.7_or_more": like}
        return Outcome(facts={"rows": dict(rows), "personal_data": dict(personal), **overlap})


def _sketches(
    run: StageRun, kind: str, sql: str, questions: Questions | None = None
) -> Iterator[Part]:
    permutations = run.recipe.curate.permutations
    with run.catalog() as catalog:
        for part, chunk in enumerate(chunked(catalog.stream(sql), run.recipe.data.shard_rows)):
            texts = [(text_id, text) for text, text_id in chunk]
            rows = sketch(kind, texts, permutations, questions)
            yield Part({"sketches": rows}, Counts(), part=part)


def _corpus(run: StageRun) -> Iterator[Part]:
    config = run.recipe.curate
    none = 2.0  # above every ROUGE-L
    parameters = {"near": config.near_duplicate, "overlap": config.evaluation_overlap or none}
    with run.catalog() as catalog:
        rows = catalog.records(CORPUS, _Candidate, parameters=parameters)
        for part, chunk in enumerate(chunked(rows, run.recipe.data.shard_rows)):
            corpus = [_example(run, row) for row in chunk]
            kept = sum(row.status == "kept" for row in corpus)
            counts = Counts(rows_in=len(corpus), kept=kept, rejected=len(corpus) - kept)
            yield Part({"corpus": corpus}, counts, part=part)


def _example(run: StageRun, row: _Candidate) -> CorpusRecord:
    config = run.recipe.curate
    personal = personal_data(f"{row.text}\n{row.answer}")
    reason = row.reason or flaw_of(
        row.text, row.answer, row.token_ids, config.min_answer_tokens, config.max_repetition
    )
    if reason is None and personal and config.personal_data == "reject":
        reason = "personal_data"
    both = zip(row.logp_specialist, row.logp_base, strict=True)
    return CorpusRecord(
        example_id=content_id("example", row.prompt_id, row.completion_id),
        prompt_id=row.prompt_id,
        completion_id=row.completion_id,
        prompt=row.rendered,
        response=render(run.recipe.data.template.response, row.answer),
        token_ends=list(row.token_ends),
        excess=[on - off for on, off in both],
        split=row.split,
        personal_data=personal,
        status="kept" if reason is None else "rejected",
        reason=reason,
    )
