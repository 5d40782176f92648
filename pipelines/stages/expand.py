"""Rounds of new prompts: propose, answer and score, select; survivors seed the next round.

Each step of a round is a wave, so a run stopped in any of them goes on there.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from stillhouse.configs.base import keyed_values
from stillhouse.configs.recipe import RecipeConfig
from stillhouse.pipelines.proposals import Proposal, Seed, few_shot, mutate
from stillhouse.pipelines.selection import judge, selection_counts
from stillhouse.pipelines.stage import Outcome, Part, Rows, Stage, Task
from stillhouse.pipelines.stage_run import StageRun
from stillhouse.pipelines.stages.score import pair_refs, score
from stillhouse.pipelines.text import normalise, render, split_of
from stillhouse.storage.manifest import Counts
from stillhouse.storage.records import PromptRecord, content_id
from stillhouse.workers.protocols import Decoding, Failed

CHUNK = 32  # proposals a task makes: a shard, and so part of what decides the sampled text
SEEDS = """
SELECT prompt_id, prompts.text, completions.text FROM selections
JOIN prompts USING (prompt_id) JOIN completions USING (completion_id)
WHERE selections.status = 'kept' AND prompts.status = 'kept' AND selections.round < ?
  AND split = 'train' ORDER BY hash(prompt_id || ?), prompt_id LIMIT ?
"""
KNOWN = """
SELECT text, bool_or(question) FROM (
    SELECT text, false AS question FROM prompts WHERE status = 'kept'
    UNION ALL SELECT text, true FROM questions WHERE status = 'kept'
) WHERE list_contains(?, text) GROUP BY text
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
        config = run.recipe.expand
        share = config.prompts_per_round // len(config.generators)
        for number in range(1, config.rounds + 1):
            prefix = f"round-{number:02d}"
            for generator in config.generators:  # one after the other: each sees what is known
                yield [
                    Task(
                        f"{prefix}-a-{generator}-{start // CHUNK:05d}",
                        arguments={
                            "do": generator,
                            "round": number,
                            "count": min(CHUNK, share - start),
                        },
                    )
                    for start in range(0, share, CHUNK)
                ]
            files = run.files("expand", "prompts", prefix)
            yield [
                Task(f"{prefix}-b-score-{index:05d}", (file,), {"do": "score"})
                for index, file in enumerate(files)
            ]
            yield [Task(f"{prefix}-c-select", arguments={"do": "select", "round": number})]

    def work(self, task: Task, run: StageRun) -> Iterator[Part]:
        match task.arguments["do"]:
            case "score":
                yield _score(run, task)
            case "select":
                yield from _select(run, int(task.arguments["round"]))
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
    prompts = _judged(run, task, generator, number, proposals)
    rejected = sum(prompt.status == "rejected" for prompt in prompts)
    failed = sum(prompt.status == "failed" for prompt in prompts)
    counts = Counts(rows_in=len(prompts), kept=0, rejected=rejected, failed=failed)
    return Part({"prompts": prompts}, counts, tokens)


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


def _judged(
    run: StageRun,
    task: Task,
    generator: str,
    number: int,
    proposals: Sequence[Proposal | Failed],
) -> list[PromptRecord]:
    texts = ["" if isinstance(item, Failed) else normalise(item.text) for item in proposals]
    with run.catalog() as catalog:
        known = dict(catalog.rows(KNOWN, [texts]))
    prompts = []
    for index, (item, text) in enumerate(zip(proposals, texts, strict=True)):
        reason = item.reason if isinstance(item, Failed) else _objection(text, known)
        known.setdefault(text, False)
        locator = f"{task.name}:{index}"
        prompts.append(
            PromptRecord(
                prompt_id=content_id("prompt", text if reason is None else locator),
                text=text,
                rendered=render(run.recipe.data.template.prompt, text),
                origin=generator,
                split=split_of(text, run.recipe.data.heldout_percent),
                round=number,
                parent_id=None if isinstance(item, Failed) else item.parent_id,
                locator=locator,
                status="kept"
                if reason is None
                else "failed"
                if isinstance(item, Failed)
                else "rejected",
                reason=reason,
            )
        )
    return prompts


def _objection(text: str, known: dict[str, bool]) -> str | None:
    if not text:
        return "empty"
    if text not in known:
        return None
    return "overlaps_evaluation" if known[text] else "duplicate"


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
