"""The specialist answers the pool; specialist and base score each answer, token by token."""

from collections.abc import Iterator, Sequence
from typing import ClassVar

from stillhouse.configs.recipe import RecipeConfig
from stillhouse.pipelines.scoring import Scored, score_prompts, score_under_target
from stillhouse.pipelines.stage import Outcome, Part, Rows, Stage, Task
from stillhouse.pipelines.stage_run import StageRun
from stillhouse.storage.manifest import Counts, FileEntry
from stillhouse.storage.records import CompletionRecord, PromptRecord
from stillhouse.workers.protocols import ModelSpec


class ScoreStage(Stage):
    """`completions` and `scores`: numbers, no decision (TuneShift-KD, arXiv:2603.24518, §3)."""

    name: ClassVar[str] = "score"
    version: ClassVar[int] = 2
    after: ClassVar[tuple[str, ...]] = ("ingest", "specialize")

    def model_refs(self, recipe: RecipeConfig) -> tuple[str, ...]:
        return (*pair_refs(recipe), *((recipe.models.target,) if recipe.score.target else ()))

    def waves(self, run: StageRun) -> Iterator[Sequence[Task]]:
        files = run.files("ingest", "prompts")
        yield [Task(f"{index:05d}", (file,)) for index, file in enumerate(files)]
        if run.recipe.score.target:  # a wave of its own: another model is loaded
            yield target_tasks(run, "target-", files, run.files(self.name, "completions"))

    def tasks_due(self, run: StageRun) -> int:
        return len(run.files("ingest", "prompts")) * (1 + run.recipe.score.target)

    def work(self, task: Task, run: StageRun) -> Iterator[Part]:
        if task.arguments:
            yield target_part(run, task)
            return
        prompts = [row for row in run.rows(task.inputs, PromptRecord) if row.status == "kept"]
        yield scored_part(score(run, prompts))

    def rows_due(self, run: StageRun) -> int:
        return int(run.facts("ingest")["prompts"])

    def finish(self, run: StageRun) -> Outcome:
        with run.catalog() as catalog:
            rows = catalog.rows(
                "SELECT origin, count(*), median(gap), median(confidence) FROM scores "
                "JOIN prompts USING (prompt_id) WHERE scores.status = 'kept' "
                "AND prompts.status = 'kept' GROUP BY origin ORDER BY origin"
            )
        origins = {
            origin: {"rows": count, "median_gap": gap, "median_confidence": confidence}
            for origin, count, gap, confidence in rows
        }
        return Outcome(facts={"origins": origins})


def pair_refs(recipe: RecipeConfig) -> tuple[str, ...]:
    """The files that make specialist and base, but for an adapter that this run trains."""
    models = recipe.models
    others = (models.specialist, models.adapter if models.adapter != "stage:specialize" else None)
    return (models.base, *(ref for ref in others if ref is not None))


def score(run: StageRun, prompts: Sequence[PromptRecord]) -> Scored:
    """Score prompts with the run's specialist and base."""
    worker = run.workers.pair(run.specialist, run.base)
    return score_prompts(prompts, worker, run.recipe.score, run.recipe.data.template)


def target_tasks(
    run: StageRun, prefix: str, prompts: Sequence[FileEntry], completions: Sequence[FileEntry]
) -> list[Task]:
    """A task for each file of completions, which goes with the file of prompts at its place."""
    return [
        Task(f"{prefix}{index:05d}", files, {"do": "target"})
        for index, files in enumerate(zip(prompts, completions, strict=True))
    ]


def target_part(run: StageRun, task: Task) -> Part:
    """Score a shard's answers under the target. They are no new rows: they came in before."""
    prompts, completions = task.inputs
    texts = {row.prompt_id: row.rendered for row in run.rows([prompts], PromptRecord)}
    worker = run.workers.model(ModelSpec(run.recipe.models.target))
    config, template = run.recipe.score, run.recipe.data.template
    answers = list(run.rows([completions], CompletionRecord))
    rows, tokens = score_under_target(answers, texts, worker, config.batch_size, template)
    return Part({"target_scores": rows}, Counts(), tokens)


def scored_part(scored: Scored) -> Part:
    """The shard of `scored`, all of its rows accounted for."""
    counts = Counts(
        rows_in=len(scored.scores),
        kept=scored.count("kept"),
        rejected=scored.count("rejected"),
        failed=scored.count("failed"),
    )
    rows: Rows = {"completions": scored.completions, "scores": scored.scores}
    return Part(rows, counts, scored.tokens)
