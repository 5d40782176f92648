"""Rounds of new prompts: propose, answer and score, select; survivors seed the next round.

Each step of a round is a wave, so a run stopped in any of them goes on there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from stillhouse.configs.base import keyed_values
from stillhouse.configs.recipe import RecipeConfig
from stillhouse.pipelines.proposals import Proposal, Seed, few_shot, mutate
from stillhouse.pipelines.raw_rows import mark_too_long, prompts_of, raw_counts
from stillhouse.pipelines.selection import judge, selection_counts
from stillhouse.pipelines.stage import Outcome, Part, Rows, Stage, Task
from stillhouse.pipelines.stage_run import StageRun
from stillhouse.pipelines.stages.score import pair_refs, score
from stillhouse.pipelines.text import chunked, normalise, render
from stillhouse.storage.manifest import Counts
from stillhouse.storage.records import PromptRecord, RawRecord, content_id
from stillhouse.workers.protocols import Decoding, Failed

CHUNK = 32  # proposals a task makes: a shard, and so part of what decides the sampled text
SEEDS = """
SELECT prompt_id, prompts.text, completions.text FROM selections
JOIN prompts USING (prompt_id) JOIN completions USING (completion_id)
WHERE selections.status = 'kept' AND prompts.status = 'kept' AND selections.round < ?
  AND split = 'train' ORDER BY md5(prompt_id || ?), prompt_id LIMIT ?
"""
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
    FROM raw WHERE kind = 'proposal' AND source = $round
) ORDER BY row
"""
MAX_SEEDS = 4096  # drawn anew each round, so a pool of any size fits


class ExpandStage(Stage):
    """More `prompts`, `completions`, `scores` and `selections`, by round."""

    name: ClassVar[str] = "expand"
    after: ClassVar[tuple[str, ...]] = ("ingest", "specialize", "score", "select")

    def settings(self, recipe: RecipeConfig) -> dict[str, Any]:
        sections = (recipe.expand, recipe.select, recipe.score)
        return {type(section).__name__: keyed_values(section) for section in sections}

    def model_refs(self, recipe: RecipeConfig) -> tuple[str, ...]:
        return pair_refs(recipe)

    def waves(self, run: StageRun) -> Iterator[Sequence[Task]]:
        for number in range(1, run.recipe.expand.rounds + 1):
            prefix = f"round-{number:02d}"
            about = {"round": number}
            yield _proposal_tasks(run, number, prefix)
            yield [Task(f"{prefix}-b-prompts", arguments=about | {"do": "judge"})]
            files = run.files(self.name, "prompts", prefix)
            yield [
                Task(f"{prefix}-c-score-{index:05d}", (file,), {"do": "score"})
                for index, file in enumerate(files)
            ]
            yield [Task(f"{prefix}-d-select", arguments=about | {"do": "select"})]
            if _is_enough(run, prefix):
                return

    def work(self, task: Task, run: StageRun) -> Iterator[Part]:
        match task.arguments["do"]:
            case "score":
                yield _score(run, task)
            case "select":
                yield from _select(run, int(task.arguments["round"]))
            case "judge":
                yield from _judge(run, int(task.arguments["round"]))
            case _:
                yield _propose(run, task)

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


def _proposal_tasks(run: StageRun, number: int, prefix: str) -> list[Task]:
    """Share the round evenly; the first generators take what is left over."""
    config = run.recipe.expand
    share, over = divmod(config.prompts_per_round, len(config.generators))
    tasks: list[Task] = []
    first = 0
    for place, generator in enumerate(config.generators):
        count = share + (place < over)
        for start in range(0, count, CHUNK):
            arguments = {
                "do": generator,
                "round": number,
                "first": first + start,
                "count": min(CHUNK, count - start),
            }
            name = f"{prefix}-a-{generator}-{start // CHUNK:05d}"
            tasks.append(Task(name, arguments=arguments))
        first += count
    return tasks


def _is_enough(run: StageRun, prefix: str) -> bool:
    """Whether enough prompts were kept, or the last round kept too small a share of its own.

    Judged as when the round ended: a killed run has shards of later rounds.
    """
    config = run.recipe.expand
    shards = [shard for shard in run.shards("expand") if shard.shard < f"{prefix}-e"]
    kept = sum(shard.counts.kept for shard in shards)
    rounds = [shard.counts for shard in shards if shard.shard.startswith(prefix)]
    proposed = sum(counts.rows_in for counts in rounds)
    round_kept = sum(counts.kept for counts in rounds)
    enough = config.enough is not None and kept >= config.enough
    return enough or round_kept < config.min_yield * proposed


def _propose(run: StageRun, task: Task) -> Part:
    generator, number = str(task.arguments["do"]), int(task.arguments["round"])
    seed = f"{run.recipe.expand.seed}/{task.name}"
    with run.catalog() as catalog:
        rows = catalog.rows(SEEDS, [number, seed, MAX_SEEDS])
    seeds = [Seed(*row) for row in rows]
    count = int(task.arguments["count"])
    tokens = 0
    if not seeds:
        proposals: list[Proposal | Failed] = []
    elif generator == "mutate":
        proposals = [*mutate(seeds, count, seed)]
    else:
        proposals, tokens = _continue(run, seeds, count, seed)
    raw = [_raw(run, task, index, item) for index, item in enumerate(proposals)]
    return Part({"raw": mark_too_long(run, raw)}, Counts(), tokens)


def _raw(run: StageRun, task: Task, index: int, item: Proposal | Failed) -> RawRecord:
    text = normalise(item.text) if isinstance(item, Proposal) else ""
    failure = item.reason if isinstance(item, Failed) else None
    reason = failure or (None if text else "empty")
    return RawRecord(
        kind="proposal",
        source=int(task.arguments["round"]),
        row=int(task.arguments["first"]) + index,
        text=text,
        rendered=render(run.recipe.data.template.prompt, text),
        origin=str(task.arguments["do"]),
        reference=None,
        parent_id=item.parent_id if isinstance(item, Proposal) else None,
        locator=f"{task.name}:{index}",
        status="kept" if reason is None else "failed" if failure else "rejected",
        reason=reason,
    )


def _judge(run: StageRun, number: int) -> Iterator[Part]:
    size = run.recipe.data.shard_rows
    percent = run.recipe.data.heldout_percent
    with run.catalog() as catalog:
        rows = catalog.records(NEW_TEXTS, RawRecord, size, {"round": number})
        for part, chunk in enumerate(chunked(rows, size)):
            counts = replace(raw_counts(chunk), kept=0)  # kept or not is for selection to say
            yield Part({"prompts": prompts_of(chunk, number, percent)}, counts, part=part)


def _continue(
    run: StageRun, seeds: Sequence[Seed], count: int, seed: str
) -> tuple[list[Proposal | Failed], int]:
    """Let the base, not the specialist, continue lists of seeds: specialists collapse."""
    config = run.recipe.expand
    lists = few_shot(seeds, config.shots, count, seed)
    how = Decoding(
        config.max_new_tokens,
        stop=("\n",),
        temperature=config.temperature,
        seed=int(content_id("seed", seed)[-8:], 16),
        batch_size=config.batch_size,
    )
    worker = run.workers.pair(run.specialist, run.base)
    answers = worker.propose([shots.prompt for shots in lists], how)
    proposals: list[Proposal | Failed] = []
    tokens = 0
    for shots, answer in zip(lists, answers, strict=True):
        if isinstance(answer, Failed):
            proposals.append(answer)
            continue
        tokens += answer.prompt_tokens + answer.tokens
        cut = answer.finish == "length"
        proposals.append(
            Failed("truncated") if cut else Proposal(shots.parent_id, answer.text.lstrip("- "))
        )
    return proposals, tokens


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
