"""What a training's stage says of its time when it took several processes."""

import time
from dataclasses import asdict

import pytest

from stillhouse.pipelines.training import train
from stillhouse.pipelines.training_clock import TrainingClock, carried_seconds
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.manifest import Counts
from stillhouse.workers.protocols import ModelSpec, TrainExample
from stillhouse.workers.scripted import ScriptedWorkers
from tests.killed import Killed
from tests.pipelines.conftest import Line, scripts


class Clock:
    """A clock that hardly moves unless told."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        self.seconds += 1e-6  # a stage takes some time
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


class Resuming(ScriptedWorkers):
    """Each step takes 100 s; dies 50 s into step 3, once, and then goes on from step 3."""

    def begin(self, clock: Clock) -> "Resuming":
        self.clock, self.kept, self.dies = clock, 0, True
        return self

    def train(self, job, on_step):
        def slow(step, total):
            if step.step <= self.kept:
                return
            if self.dies and step.step == 3:
                self.clock.seconds += 50
                self.dies = False
                raise Killed
            self.clock.seconds += 100
            on_step(step, total)
            self.kept = step.step

        return super().train(job, slow)


def test_a_resumed_training_counts_the_seconds_of_all_its_steps(line: Line, clock: Clock) -> None:
    line.pool("special thing", "another special thing", "common ground")
    line.questions(**{"two words": "C22", "one more word": "A00"})
    line.tree |= {"expand": {"rounds": 1, "prompts_per_round": 4}}
    line.tree |= {"distill": {"batch_size": 1, "epochs": 3}}
    line.workers = Resuming(scripts()).begin(clock)
    with pytest.raises(Killed):
        line.run("distill")
    report = line.run("distill")["stages"]["distill"]
    [(steps, tokens)] = line.rows("SELECT count(*), sum(tokens) FROM train_steps")
    assert steps > 3
    assert report["tokens"] == tokens
    assert report["seconds"] == pytest.approx(
        100 * steps, abs=0.1
    )  # the 50 s that were lost made no token
    assert report["tokens_per_second"] == pytest.approx(tokens / (100 * steps), abs=0.05)


def test_an_example_that_is_there_twice_is_counted_twice(line: Line) -> None:
    twice = [TrainExample("a", "one", " x"), *[TrainExample("b", "two", " ")] * 2]
    run = line.stage("distill")
    part = train(run, ModelSpec("target"), twice, line.recipe.distill)
    told = [asdict(row)["status"] for row in part.rows["examples"]]
    assert told == ["kept", "rejected", "rejected"]
    assert part.counts == Counts(rows_in=3, kept=1, rejected=2)


def test_which_seconds_are_carried(tmp_path, clock: Clock) -> None:
    folder = RunFolder(tmp_path)

    def process(*steps: int) -> None:
        path = folder.stage_dir("distill", "k") / "train"
        timer = TrainingClock(folder, path)
        for step in steps:
            clock.seconds += step
            timer.step(step)

    def carried() -> float:
        return carried_seconds(folder, "distill", "k")

    assert carried() == 0
    process(1, 2, 3, 4)
    assert carried() == 0  # all of it is this process's own
    process(3, 4, 5)  # the last checkpoint was of step 2
    assert carried() == pytest.approx(1 + 2, abs=0.01)
    process()  # trained to the end before
    assert carried() == pytest.approx(1 + 2 + 3 + 4 + 5, abs=0.01)
    process(1)  # all anew, as `--resume never` does
    assert carried() == 0
    assert carried_seconds(folder, "distill", "other") == 0
