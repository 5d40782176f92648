"""Train the specialist on private pairs, where the truth is wanted: demos and benchmarks."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from stillhouse.configs.base import keyed_values
from stillhouse.configs.recipe import RecipeConfig
from stillhouse.errors import SourceError
from stillhouse.pipelines.stage import Outcome, Part, Stage, Task
from stillhouse.pipelines.stage_run import StageRun
from stillhouse.pipelines.text import normalise, render
from stillhouse.pipelines.training import train, trained
from stillhouse.storage.records import content_id
from stillhouse.workers.protocols import TrainExample
from stillhouse.workers.sources.reader import MalformedRow, read


class SpecializeStage(Stage):
    """An adapter on the base. It and the ceiling arm alone read `data.private`."""

    name: ClassVar[str] = "specialize"

    def settings(self, recipe: RecipeConfig) -> dict[str, Any]:
        return super().settings(recipe) | private_settings(recipe)

    def model_refs(self, recipe: RecipeConfig) -> tuple[str, ...]:
        return (recipe.models.base,)

    def data_refs(self, recipe: RecipeConfig) -> tuple[str, ...]:
        return private_refs(recipe)

    def waves(self, run: StageRun) -> Iterator[Sequence[Task]]:
        yield [Task("train")]

    def work(self, task: Task, run: StageRun) -> Iterator[Part]:
        examples, malformed = private_examples(run.recipe)
        yield train(run, run.base, examples, run.recipe.specialize, malformed=malformed)

    def finish(self, run: StageRun) -> Outcome:
        return trained(run)


def private_settings(recipe: RecipeConfig) -> dict[str, Any]:
    """What of the recipe decides the private examples."""
    private = recipe.data.private
    return {
        "private": None if private is None else keyed_values(private),
        "template": keyed_values(recipe.data.template),
    }


def private_refs(recipe: RecipeConfig) -> tuple[str, ...]:
    """The private source, where there is one."""
    return () if recipe.data.private is None else (recipe.data.private.ref,)


def private_examples(recipe: RecipeConfig) -> tuple[list[TrainExample], list[MalformedRow]]:
    """Read the private pairs, and set aside the lines that are none."""
    source = recipe.data.private
    if source is None:
        raise SourceError("data.private: expected a source of training pairs, found none")
    examples, malformed = [], []
    for number, row in enumerate(read(source.ref, Path.cwd(), (source.prompt, source.response))):
        if source.limit is not None and number >= source.limit:
            break
        if isinstance(row, MalformedRow):
            malformed.append(row)
            continue
        prompt = render(recipe.data.template.prompt, normalise(row.values[source.prompt]))
        response = render(recipe.data.template.response, row.values[source.response].strip())
        examples.append(TrainExample(content_id("private", prompt, response), prompt, response))
    return examples, malformed
