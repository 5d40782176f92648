"""Train the target on the corpus: the specialist's answers, nothing else."""

from collections.abc import Iterator, Sequence
from typing import ClassVar

from stillhouse.configs.recipe import RecipeConfig
from stillhouse.pipelines.stage import Outcome, Part, Stage, Task
from stillhouse.pipelines.stage_run import StageRun
from stillhouse.pipelines.training import train, trained
from stillhouse.storage.records import CorpusRecord
from stillhouse.workers.protocols import ModelSpec, TrainExample


class DistillStage(Stage):
    """An adapter on the target, `train_steps` and `examples`."""

    name: ClassVar[str] = "distill"
    after: ClassVar[tuple[str, ...]] = ("curate",)

    def model_refs(self, recipe: RecipeConfig) -> tuple[str, ...]:
        return (recipe.models.target,)

    def waves(self, run: StageRun) -> Iterator[Sequence[Task]]:
        yield [Task("train", tuple(run.files("curate", "corpus")))]

    def work(self, task: Task, run: StageRun) -> Iterator[Part]:
        examples = [
            TrainExample(row.example_id, row.prompt, row.response, row.token_ends, row.excess)
            for row in run.rows(task.inputs, CorpusRecord)
            if row.status == "kept" and row.split == "train"
        ]
        yield train(run, ModelSpec(run.recipe.models.target), examples, run.recipe.distill)

    def rows_due(self, run: StageRun) -> int:
        return int(run.facts("curate")["rows"].get("train", 0))

    def finish(self, run: StageRun) -> Outcome:
        return trained(run)
