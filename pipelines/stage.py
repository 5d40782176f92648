"""What a stage is: a name, a key, tasks in waves, and one method that does a task's work.

A stage is one small file under `pipelines/stages/`. The executor knows nothing of it: it runs
the tasks of a wave in any order, writes what `work` yields as shards, and hands their manifest
entries to the runner. A wave starts when the one before it is committed.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from stillhouse.configs.base import keyed_values
from stillhouse.configs.recipe import RecipeConfig
from stillhouse.pipelines.stage_run import StageRun
from stillhouse.storage.manifest import Counts, FileEntry
from stillhouse.storage.records import Record


@dataclass(frozen=True, slots=True)
class Task:
    """A unit of work that is done wholly or again; `name` is its shard's name."""

    name: str
    inputs: tuple[FileEntry, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)


Rows = Mapping[str, Sequence[Record]]  # by table


@dataclass(frozen=True, slots=True)
class Part:
    """Rows by table that become one shard; `part` numbers them where a task streams several."""

    rows: Rows
    counts: Counts
    tokens: int = 0
    part: int | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished stage leaves beside its tables: artifacts, and facts for later stages."""

    files: tuple[FileEntry, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


class Stage(ABC):
    """One step of the line; its tables are appended and never edited."""

    name: ClassVar[str]
    version: ClassVar[int] = 1  # raised when the stage writes something else for the same input
    after: ClassVar[tuple[str, ...]] = ()  # stages whose tables or facts it reads

    def settings(self, recipe: RecipeConfig) -> dict[str, Any]:
        """The part of the recipe that decides what this stage writes."""
        return keyed_values(getattr(recipe, self.name))

    def model_refs(self, recipe: RecipeConfig) -> tuple[str, ...]:
        """Models whose files decide what this stage writes."""
        return ()

    def data_refs(self, recipe: RecipeConfig) -> tuple[str, ...]:
        """Data whose content decides what this stage writes."""
        return ()

    @abstractmethod
    def waves(self, run: StageRun) -> Iterator[Sequence[Task]]:
        """The stage's tasks; those of one wave do not depend on each other."""

    @abstractmethod
    def work(self, task: Task, run: StageRun) -> Iterator[Part]:
        """Do one task. The same task yields the same parts, to the byte."""

    def tasks_due(self, run: StageRun) -> int | None:
        """How many tasks all waves have together, for the progress bar; None: known too late."""
        return None

    def rows_due(self, run: StageRun) -> int | None:
        """How many rows must have come in, counted where they come from; None: not known there."""
        return None

    def finish(self, run: StageRun) -> Outcome:
        """Say what the finished stage leaves."""
        return Outcome()
