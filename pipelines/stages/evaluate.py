"""Every arm answers the held-out questions; the gate says whether the student learnt enough."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from stillhouse.configs.base import keyed_values
from stillhouse.configs.recipe import RecipeConfig
from stillhouse.pipelines.answering import answer_questions, summary
from stillhouse.pipelines.gate import recovery
from stillhouse.pipelines.stage import Outcome, Part, Stage, Task
from stillhouse.pipelines.stage_run import StageRun
from stillhouse.pipelines.stages.score import pair_refs
from stillhouse.pipelines.stages.specialize import (
    private_examples,
    private_refs,
    private_settings,
)
from stillhouse.pipelines.training import adapter_files, train
from stillhouse.storage.records import QuestionRecord
from stillhouse.workers.protocols import ModelSpec


class EvaluateStage(Stage):
    """`evaluations`: one row an arm and question."""

    name: ClassVar[str] = "evaluate"
    after: ClassVar[tuple[str, ...]] = ("ingest", "specialize", "distill")

    def settings(self, recipe: RecipeConfig) -> dict[str, Any]:
        values = super().settings(recipe)
        del values["gate"]  # it judges what was measured: `deploy` applies it
        if "ceiling" in recipe.evaluate.arms:
            values |= private_settings(recipe) | {"distill": keyed_values(recipe.distill)}
        return values

    def model_refs(self, recipe: RecipeConfig) -> tuple[str, ...]:
        return (*pair_refs(recipe), recipe.models.target)

    def data_refs(self, recipe: RecipeConfig) -> tuple[str, ...]:
        return private_refs(recipe) if "ceiling" in recipe.evaluate.arms else ()

    def waves(self, run: StageRun) -> Iterator[Sequence[Task]]:
        arms = run.recipe.evaluate.arms
        if "ceiling" in arms:
            yield [Task("ceiling-train")]
        files = run.files("ingest", "questions")
        for arm in arms:  # one wave an arm: one model in memory at a time
            yield [
                Task(f"{arm}-{index:05d}", (file,), {"arm": arm})
                for index, file in enumerate(files)
            ]

    def tasks_due(self, run: StageRun) -> int:
        arms = run.recipe.evaluate.arms
        return len(arms) * len(run.files("ingest", "questions")) + ("ceiling" in arms)

    def work(self, task: Task, run: StageRun) -> Iterator[Part]:
        if task.name == "ceiling-train":
            yield _train_ceiling(run)
            return
        arm = str(task.arguments["arm"])
        questions = [row for row in run.rows(task.inputs, QuestionRecord) if row.status == "kept"]
        yield answer_questions(run, arm, _model_of(run, arm), questions)

    def rows_due(self, run: StageRun) -> int:
        asked = len(run.recipe.evaluate.arms) * int(run.facts("ingest")["questions"])
        trained = run.manifest.shards(self.name, run.key).get("ceiling-train")
        return asked + (trained.counts.rows_in if trained else 0)

    def finish(self, run: StageRun) -> Outcome:
        with run.catalog() as catalog:
            arms = {str(arm): summary(catalog, arm) for arm in run.recipe.evaluate.arms}
        for arm, figures in arms.items():
            for name in ("exact_match", "perplexity"):
                if figures[name] is not None:
                    run.observer.metric(self.name, f"{arm}.{name}", figures[name], 0)
        ceiling = adapter_files(run, run.directory / "ceiling") if "ceiling" in arms else ()
        return Outcome(ceiling, {"arms": arms, "recovery": recovery(arms)})


def _model_of(run: StageRun, arm: str) -> ModelSpec:
    target = run.recipe.models.target
    match arm:
        case "base":
            return run.base
        case "specialist":
            return run.specialist
        case "target_before":
            return ModelSpec(target)
        case "student":
            return run.student
        case _:
            return ModelSpec(target, run.directory / "ceiling" / "adapter")


def _train_ceiling(run: StageRun) -> Part:
    target = ModelSpec(run.recipe.models.target)
    examples, malformed = private_examples(run.recipe)
    folder = run.directory / "ceiling"
    return train(run, target, examples, run.recipe.distill, folder, malformed=malformed)
