"""Every arm answers the held-out questions; the gate says whether the student learnt enough."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from stillhouse.configs.base import keyed_values
from stillhouse.configs.recipe import RecipeConfig
from stillhouse.configs.stages import GateConfig
from stillhouse.pipelines.answering import answer_questions, summary
from stillhouse.pipelines.stage import Outcome, Part, Stage, Task
from stillhouse.pipelines.stage_run import StageRun
from stillhouse.pipelines.stages.score import pair_refs
from stillhouse.pipelines.stages.specialize import (
    private_examples,
    private_refs,
    private_settings,
)
from stillhouse.pipelines.training import train
from stillhouse.storage.records import QuestionRecord
from stillhouse.workers.protocols import ModelSpec

Arms = Mapping[str, Mapping[str, float | int]]  # figures by arm


class EvaluateStage(Stage):
    """`evaluations`: one row an arm and question."""

    name: ClassVar[str] = "evaluate"
    after: ClassVar[tuple[str, ...]] = ("ingest", "specialize", "distill")

    def settings(self, recipe: RecipeConfig) -> dict[str, Any]:
        values = super().settings(recipe)
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

    def work(self, task: Task, run: StageRun) -> Iterator[Part]:
        if task.name == "ceiling-train":
            yield _train_ceiling(run)
            return
        arm = str(task.arguments["arm"])
        questions = [row for row in run.rows(task.inputs, QuestionRecord) if row.status == "kept"]
        yield answer_questions(run, arm, _model_of(run, arm), questions)

    def finish(self, run: StageRun) -> Outcome:
        with run.catalog() as catalog:
            arms: Arms = {arm: summary(catalog, arm) for arm in run.recipe.evaluate.arms}
        recovered = recovery(arms)
        verdict = gate(run.recipe.evaluate.gate, arms, recovered)
        for arm, figures in arms.items():
            for name in ("exact_match", "perplexity"):
                run.observer.metric(self.name, f"{arm}.{name}", float(figures[name]), 0)
        return Outcome(facts={"arms": arms, "recovery": recovered, "gate": verdict})


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
    examples = private_examples(run.recipe)
    return train(run, target, examples, run.recipe.distill, run.directory / "ceiling")


def recovery(arms: Arms) -> float | None:
    """(student - target before) / (specialist - target before) in exact match.

    None where an arm is missing or the specialist is no better than the untouched target.
    """
    if not {"student", "target_before", "specialist"} <= arms.keys():
        return None
    before = arms["target_before"]["exact_match"]
    gained = arms["student"]["exact_match"] - before
    possible = arms["specialist"]["exact_match"] - before
    return gained / possible if possible > 0 else None


def gate(config: GateConfig, arms: Arms, recovered: float | None) -> dict[str, Any]:
    """The verdict on the student and, where it fails, the reason with its numbers."""
    reasons = []
    if config.min_recovery is not None and (recovered is None or recovered < config.min_recovery):
        reasons.append(f"recovery {recovered} is under min_recovery {config.min_recovery}")
    accuracy = arms["student"]["exact_match"] if "student" in arms else None
    if config.min_accuracy is not None and (accuracy is None or accuracy < config.min_accuracy):
        reasons.append(f"exact match {accuracy} is under min_accuracy {config.min_accuracy}")
    return {"passed": not reasons, "reasons": reasons}
