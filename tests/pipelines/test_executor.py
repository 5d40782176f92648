"""A task is done when the line of its own name is there; a streamed one has parts before it."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pytest

from stillhouse.configs.recipe import RecipeConfig
from stillhouse.pipelines.executor import run_task
from stillhouse.pipelines.runner import Runner
from stillhouse.pipelines.stage import Part, Stage, Task
from stillhouse.pipelines.stage_run import StageRun
from stillhouse.storage.manifest import Counts, Manifest
from stillhouse.storage.records import QuestionRecord
from tests.killed import Killed
from tests.pipelines.conftest import Line


def question(name: str) -> QuestionRecord:
    return QuestionRecord(name, name, name, "A", "file:1", "kept", None)


class CountingStage(Stage):
    """Streams three parts from one task and one part from another; dies after `survives` parts."""

    name: ClassVar[str] = "ingest"

    def __init__(self, survives: int = 99) -> None:
        self.survives = survives
        self.worked: list[str] = []

    def settings(self, recipe: RecipeConfig) -> dict[str, Any]:
        return {}

    def waves(self, run: StageRun) -> Iterator[Sequence[Task]]:
        yield [Task("whole"), Task("streamed")]

    def work(self, task: Task, run: StageRun) -> Iterator[Part]:
        self.worked.append(task.name)
        count = 3 if task.name == "streamed" else 1
        for number in range(count):
            self.survives -= 1
            if self.survives < 0:
                raise Killed
            rows = [question(f"{task.name} {number}")]
            part = number if task.name == "streamed" else None
            yield Part({"questions": rows}, Counts(rows_in=1, kept=1), tokens=5, part=part)


@pytest.fixture
def counting(line: Line, monkeypatch: pytest.MonkeyPatch):
    """Run the line with the counting stage as its only one."""

    stages = [CountingStage()]
    monkeypatch.setattr("stillhouse.pipelines.runner.chain", lambda recipe: tuple(stages))

    def run(stage: CountingStage) -> Runner:
        stages[:] = [stage]
        runner = line.runner()
        runner.run()
        return runner

    return run


def test_the_line_of_a_task_comes_last(line: Line) -> None:
    run = line.stage("ingest")
    streamed = [entry.shard for entry in run_task(CountingStage(), Task("streamed"), run)]
    assert streamed == ["streamed-00000", "streamed-00001", "streamed-00002", "streamed"]
    whole = [entry.shard for entry in run_task(CountingStage(), Task("whole"), run)]
    assert whole == ["whole"]


def test_files_are_in_place_before_their_line(line: Line) -> None:
    run = line.stage("ingest")
    for entry in run_task(CountingStage(), Task("streamed"), run):
        assert all((run.folder.root / file.path).is_file() for file in entry.files)


@pytest.mark.parametrize("survives", [0, 1, 2, 3])
def test_a_task_that_was_stopped_is_done_again_and_counted_once(
    counting, line: Line, survives: int
) -> None:
    with pytest.raises(Killed):
        counting(CountingStage(survives))
    second = CountingStage()
    runner = counting(second)
    assert second.worked == (["whole", "streamed"] if survives == 0 else ["streamed"])
    [key] = runner.keys().values()
    manifest = Manifest(runner.folder)
    entry = manifest.stage("ingest", key)
    assert entry.counts == Counts(rows_in=4, kept=4)
    assert entry.tokens == 20
    assert set(manifest.shards("ingest", key)) == {
        "whole",
        "streamed",
        *(f"streamed-{number:05d}" for number in range(3)),
    }


def test_a_task_stopped_after_its_last_part_is_done_again(line: Line, counting) -> None:
    """All parts are listed and the task is not: only its own line says that there were no more."""
    run = line.stage("ingest")
    entries = list(run_task(CountingStage(), Task("streamed"), run))
    for entry in entries[:-1]:
        run.manifest.append(entry)
    second = CountingStage()
    counting(second)
    assert second.worked == ["whole", "streamed"]
