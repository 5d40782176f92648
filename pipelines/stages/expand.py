"""Rounds of new prompts: propose, answer and score, select; survivors seed the next round.

Each step of a round is a wave, so a run stopped in any of them goes on there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from stillhouse.configs.base import keyed_values
from stillhouse.configs.recipe import RecipeConfig
from stillhouse.pipelines.generation import proposal_tasks, propose
from stillhouse.pipelines.raw_rows import prompts_of, raw_counts
from stillhouse.pipelines.rounds import round_record
from stillhouse.pipelines.selection import judge, selection_counts
from stillhouse.pipelines.stage import Outcome, Part, Rows, Stage, Task
from stillhouse.pipelines.stage_run import StageRun
from stillhouse.pipelines.stages.score import pair_refs, score, target_part, target_tasks
from stillhouse.pipelines.text import chunked
from stillhouse.storage.manifest import Counts
from stillhouse.storage.records import PromptRecord, RawRecord

# Judged in one task after all proposals of the round, so these may be made in any order.
NEW_TEXTS = """
SELECT * EXCLUDE (status, reason, again),
    CASE WHEN status = 'kept' AND (again OR leak OR known) THEN 'rejected' ELSE status END
        AS status,
    CASE WHEN status <> 'kept' THEN reason WHEN leak THEN 'overlaps_evaluation'
         WHEN again OR known THEN 'duplicate' END AS reason
FROM (
    SELECT *,
        row_number() OVER (PARTITION BY text, status = 'kept' ORDER BY row) > 1 AS again,
        text IN (SELECT text FROM questions WHERE status = 'kept') AS leak,
        text IN (SELECT text FROM prompts WHERE status = 'kept' AND round < $round) AS known
    FROM raw WHERE kind = 'generated' AND source = $round
) ORDER BY row
"""


class ExpandStage(Stage):
    """More `prompts`, `completions`, `scores` and `selections`, by round."""

    name: ClassVar[str] = "expand"
    version: ClassVar[int] = 2
    after: ClassVar[tuple[str, ...]] = ("ingest", "specialize", "score", "select")

    def settings(self, recipe: RecipeConfig) -> dict[str, Any]:
        sections = (recipe.expand, recipe.select, recipe.score)
        return {type(section).__name__: keyed_values(section) for section in sections}

    def model_refs(self, recipe: RecipeConfig) -> tuple[str, ...]:
        named = {"base": (), "specialist": (), "target": (recipe.models.target,)}
        asked = (item.model for item in recipe.expand.generators if item.endpoint is None)
        others = (ref for model in asked for ref in named.get(model, (model,)))
        target = (recipe.models.target,) if recipe.score.target else ()
        return tuple(dict.fromkeys((*pair_refs(recipe), *others, *target)))

    def waves(self, run: StageRun) -> Iterator[Sequence[Task]]:
        yield [Task("round-00-e-coverage", arguments={"do": "cover", "round": 0})]
        for number in range(1, run.recipe.expand.rounds + 1):
            prefix = f"round-{number:02d}"
            about = {"round": number}
            yield proposal_tasks(run, number, prefix)
            yield [Task(f"{prefix}-b-prompts", arguments=about | {"do": "judge"})]
            files = run.files(self.name, "prompts", prefix)
            yield [
                Task(f"{prefix}-c-score-{index:05d}", (file,), {"do": "score"})
                for index, file in enumerate(files)
            ]
            if run.recipe.score.target:
                answers = run.files(self.name, "completions", prefix)
                yield target_tasks(run, f"{prefix}-c-target-", files, answers)
            yield [Task(f"{prefix}-d-select", arguments=about | {"do": "select"})]
            yield [Task(f"{prefix}-e-coverage", arguments=about | {"do": "cover"})]
            if _is_enough(run, prefix):
                return

    def work(self, task: Task, run: StageRun) -> Iterator[Part]:
        match task.arguments["do"]:
            case "propose":
                yield propose(run, task)
            case "score":
                yield _score(run, task)
            case "target":
                yield target_part(run, task)
            case "select":
                yield from _select(run, int(task.arguments["round"]))
            case "judge":
                yield from _judge(run, int(task.arguments["round"]))
            case _:
                record = round_record(run, int(task.arguments["round"]))
                yield Part({"rounds": [record]}, Counts())

    def finish(self, run: StageRun) -> Outcome:
        with run.catalog() as catalog:
            rows = catalog.rows(
                "SELECT prompts.round, origin, count(*), "
                "count(*) FILTER (selections.status = 'kept') FROM prompts "
                "LEFT JOIN selections USING (prompt_id) WHERE prompts.round > 0 "
                "GROUP BY ALL ORDER BY ALL"
            )
        rounds = [
            {"round": number, "generator": origin, "proposed": count, "kept": kept}
            for number, origin, count, kept in rows
        ]
        return Outcome(facts={"rounds": rounds})


def _is_enough(run: StageRun, prefix: str) -> bool:
    """Whether enough prompts were kept, or the last round kept too small a share of its own.

    Judged as when the round ended: a killed run has shards of later rounds.
    """
    config = run.recipe.expand
    shards = [shard for shard in run.shards("expand") if shard.shard < f"{prefix}-f"]
    kept = sum(shard.counts.kept for shard in shards)
    rounds = [shard.counts for shard in shards if shard.shard.startswith(prefix)]
    proposed = sum(counts.rows_in for counts in rounds)
    round_kept = sum(counts.kept for counts in rounds)
    enough = config.enough is not None and kept >= config.enough
    return enough or round_kept < config.min_yield * proposed


def _judge(run: StageRun, number: int) -> Iterator[Part]:
    size = run.recipe.data.shard_rows
    percent = run.recipe.data.heldout_percent
    with run.catalog() as catalog:
        rows = catalog.records(NEW_TEXTS, RawRecord, size, {"round": number})
        for part, chunk in enumerate(chunked(rows, size)):
            counts = replace(raw_counts(chunk), kept=0)  # kept or not is for selection to say
            yield Part({"prompts": prompts_of(chunk, number, percent)}, counts, part=part)


def _score(run: StageRun, task: Task) -> Part:
    prompts = [row for row in run.rows(task.inputs, PromptRecord) if row.status == "kept"]
    scored = score(run, prompts)
    counts = Counts(rejected=scored.count("rejected"), failed=scored.count("failed"))
    rows: Rows = {"completions": scored.completions, "scores": scored.scores}
    return Part(rows, counts, scored.tokens)


def _select(run: StageRun, number: int) -> Iterator[Part]:
    for part, rows in enumerate(judge(run, number)):
        counts = selection_counts(rows)
        counts = Counts(kept=counts.kept, rejected=counts.rejected)  # they came in as proposals
        yield Part({"selections": rows}, counts, part=part)
