"""The runner on scripted models: what is reused, what is refused, what is told."""

import json
from pathlib import Path

import pytest

from stillhouse.errors import (
    AccountingError,
    ConfigError,
    IntegrityError,
    LockedError,
    SourceError,
    TrainingError,
)
from stillhouse.pipelines.observer import Observer, Observers
from stillhouse.pipelines.stages.score import ScoreStage
from stillhouse.pipelines.text import split_of
from stillhouse.storage.lock import RunLock
from stillhouse.storage.manifest import Counts, Manifest
from tests.pipelines.conftest import Line


class Listener(Observer):
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def run_opened(self, keys) -> None:
        self.heard.append("opened")

    def run_started(self, keys) -> None:
        self.heard.append("started")

    def stage_started(self, stage: str, key: str, reused_shards: int) -> None:
        self.heard.append(f"{stage} {reused_shards}")

    def stage_cached(self, entry) -> None:
        self.heard.append(f"{entry.stage} cached")

    def run_finished(self, report) -> None:
        self.heard.append("finished")


@pytest.fixture
def whole(line: Line) -> Line:
    line.pool("special thing", "another special thing", "common ground")
    line.questions(**{"two words": "C22", "one more word": "A00"})
    line.tree["expand"] = {"rounds": 1, "prompts_per_round": 4}
    return line


def heard(line: Line, **how) -> list[str]:
    listener = Listener()
    line.runner(listener).run(**how)
    return listener.heard


def ran(events: list[str]) -> list[str]:
    """The stages that were started."""
    return [event.split()[0] for event in events if event.endswith(" 0")]


def test_the_whole_line_and_then_nothing(whole: Line) -> None:
    first = heard(whole)
    assert ran(first) == [
        *("ingest", "score", "select", "expand", "curate"),
        *("distill", "evaluate", "compress", "deploy"),
    ]
    calls = dict(whole.workers.calls)
    again = heard(whole)
    assert again == ["opened", *(f"{stage} cached" for stage in ran(first))]
    assert whole.workers.calls == calls


def test_a_changed_setting_runs_what_follows_it(whole: Line) -> None:
    heard(whole)
    whole.tree["distill"] = {"learning_rate": 0.5}
    assert ran(heard(whole)) == ["distill", "evaluate", "compress", "deploy"]
    whole.tree["score"] = {"batch_size": 1}
    assert ran(heard(whole)) == []


def test_going_back_to_former_settings_reuses_what_they_made(whole: Line) -> None:
    whole.run()
    first = report(whole)
    whole.tree["distill"] = {"learning_rate": 0.5}
    whole.run()
    assert report(whole)["keys"] != first["keys"]
    whole.tree["distill"] = {}
    assert ran(heard(whole)) == []
    assert report(whole) == first  # the file on disk is of this recipe again


def test_changed_data_runs_everything(whole: Line) -> None:
    whole.run()
    whole.pool("another special thing")
    assert ran(heard(whole))[0] == "ingest"
    assert whole.rows("SELECT count(*) FROM prompts WHERE round = 0") == [(1,)]


def report(line: Line) -> dict:
    return json.loads(line.runner().folder.report.read_text())


@pytest.mark.parametrize("stale", [False, True])
def test_a_run_stopped_before_its_report_writes_it(whole: Line, stale: bool) -> None:
    whole.run()
    first = report(whole)
    folder = whole.runner().folder
    if stale:  # the report of other settings is still there
        folder.report.write_text(json.dumps(first | {"keys": {"ingest": "other"}}))
    else:
        folder.report.unlink()
    assert heard(whole)[-1] == "finished"
    assert report(whole) == first


def test_until(whole: Line) -> None:
    assert ran(heard(whole, until="select")) == ["ingest", "score", "select"]
    assert set(report(whole)["stages"]) == {"ingest", "score", "select"}
    assert "accuracy" not in report(whole)
    assert ran(heard(whole))[0] == "expand"
    assert "recovery" in report(whole)
    with pytest.raises(ConfigError, match="no stage 'selct': expected one of ingest"):
        heard(whole, until="selct")


def test_resume_must_refuses_to_start_anew(whole: Line) -> None:
    with pytest.raises(ConfigError, match=r"--resume must: .* holds no shard of this recipe"):
        heard(whole, resume="must")
    assert not whole.runner().folder.root.exists()
    heard(whole, until="score")
    assert "select 0" in heard(whole, resume="must", until="select")


def test_resume_never_starts_anew(whole: Line) -> None:
    heard(whole)
    assert ran(heard(whole, resume="never", until="score")) == ["ingest", "score"]
    folder = whole.runner().folder
    assert {path.name for path in (folder.root / "stages").iterdir()} == {"ingest", "score"}


def test_resume_never_that_is_killed_leaves_no_line_without_its_file(
    whole: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard(whole, until="score")

    def killed(path: Path, **how) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("stillhouse.pipelines.runner.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            heard(whole, resume="never")
    heard(whole)


def test_the_files_of_a_run_keep_the_order_of_the_line(whole: Line) -> None:
    whole.run()
    names = [stage.name for stage in whole.runner().stages()]
    assert list(json.loads(whole.runner().folder.plan.read_text())) == names
    assert list(report(whole)["stages"]) == names


def test_the_written_recipe_holds_no_password(whole: Line) -> None:
    whole.tree["tracking"]["uri"] = "https://user:pass@example.org/mlflow"
    whole.run("ingest")
    text = whole.runner().folder.recipe.read_text()
    assert json.loads(text)["tracking"]["uri"] == "https://[redacted]@example.org/mlflow"
    assert json.loads(text)["data"] == whole.recipe.model_dump(mode="json")["data"]


def test_a_second_runner_is_told(whole: Line) -> None:
    folder = whole.runner().folder
    with RunLock(folder), pytest.raises(LockedError, match="is being run by process"):
        whole.run()
    whole.run("ingest")


def test_an_edited_file_is_named(whole: Line) -> None:
    whole.run("score")
    path = next(whole.runner().folder.root.glob("stages/score/*/scores/*.parquet"))
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match=f"scores/{path.name} is not what was committed"):
        whole.run()


def test_rows_that_do_not_add_up_stop_the_run(whole: Line, monkeypatch) -> None:
    def losing(self, task, run):
        for part in original(self, task, run):
            counts = Counts(part.counts.rows_in + 1, part.counts.kept)
            yield type(part)(part.rows, counts, part.tokens, part.part)

    original = ScoreStage.work
    monkeypatch.setattr(ScoreStage, "work", losing)
    with pytest.raises(AccountingError, match="stage score: 4 rows came in, but kept 3"):
        whole.run()
    runner = whole.runner()
    assert Manifest(runner.folder).stage("score", runner.keys()["score"]) is None


def test_nothing_to_train_on_is_explained(whole: Line) -> None:
    whole.tree["data"]["heldout_percent"] = 50
    whole.pool(next(f"part {n}" for n in range(99) if split_of(f"part {n}", 50) == "heldout"))
    with pytest.raises(TrainingError, match="distill: expected training examples, found none"):
        whole.run()


def test_nothing_selected_is_explained(whole: Line) -> None:
    whole.pool("common ground", "more common ground")  # the base knows it
    with pytest.raises(SourceError, match=r"select: .*found 2 low_gap; .*query .*/line \""):
        whole.run()


def test_progress_counts_over_all_waves(whole: Line) -> None:
    told: list[tuple[int, int]] = []

    class Progress(Observer):
        def progress(self, stage: str, done: int, total: int, unit: str) -> None:
            if stage == "evaluate":
                told.append((done, total))

    whole.run(observer=Progress())
    steps = dict.fromkeys(told)  # a wave ends where the next begins
    assert list(steps) == [(done, 4) for done in range(5)]


def test_observers_hear_everything() -> None:
    """A new event must reach each member."""
    told: list[str] = []

    def listener() -> Observer:
        observer = Observer()
        for name in events:
            setattr(observer, name, lambda *_, name=name: told.append(name))
        return observer

    events = [name for name in vars(Observer) if not name.startswith("_")]
    both = Observers((listener(), listener()))
    for name in events:
        arity = getattr(Observer, name).__code__.co_argcount - 1
        getattr(both, name)(*[None] * arity)
    assert told == [name for name in events for _ in range(2)]
