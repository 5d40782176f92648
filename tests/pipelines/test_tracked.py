"""A tracked run's events: what is written down when, and again after a kill."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from stillhouse.errors import StillhouseError, TrackingError, TrainingError
from stillhouse.pipelines.observer import Observer, Observers
from stillhouse.pipelines.tracked import TrackingObserver
from stillhouse.storage.events import EventLog
from stillhouse.storage.integrity import sha256_of
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.tracking.database import default_uri
from stillhouse.storage.tracking.settings import mlflow_quiet
from stillhouse.storage.tracking.tracker import Tracker
from stillhouse.workers.scripted import Script
from tests.killed import Killed
from tests.pipelines.conftest import Killer, Line, Notes


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody takes the events: these tests read them from the file."""
    monkeypatch.setattr(Tracker, "probe", lambda self: "no server in this test")


@pytest.fixture
def whole(line: Line) -> Line:
    line.pool("special thing", "another special thing", "common ground")
    line.questions(**{"two words": "C22", "one more word": "A00"})
    line.tree["expand"] = {"rounds": 1, "prompts_per_round": 4}
    line.tree["evaluate"] = {"gate": {"min_accuracy": 0.0}}
    return line


def start(line: Line, *before: Observer, **how: Any) -> list[dict[str, Any]]:
    """Run the line, tracked; return the events that this start wrote."""
    already = len(events(line))
    tracking = TrackingObserver(line.recipe, Observer())
    line.runner(Observers((*before, tracking))).run(**how)
    return events(line)[already:]


def folder_of(line: Line) -> RunFolder:
    return line.runner().folder


def events(line: Line) -> list[dict[str, Any]]:
    return read(folder_of(line))


def read(folder: RunFolder) -> list[dict[str, Any]]:
    path = folder.events
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def kinds(found: list[dict[str, Any]], *wanted: str) -> list[str]:
    """`kind stage` of each event, metrics left out."""
    names = [f"{e['kind']} {e['stage'] or ''}".strip() for e in found if e["kind"] != "metric"]
    return [name for name in names if not wanted or name.split()[0] in wanted]


def test_a_refusal_at_the_end_leaves_the_run_finished(
    whole: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Tracker) -> int:
        raise TrackingError("the tracking server refused event 3")

    monkeypatch.setattr(Tracker, "flush", refuse)
    console = Notes()
    tracking = TrackingObserver(whole.recipe, console)
    assert whole.runner(tracking).run()["stages"].keys() >= {"deploy"}
    assert events(whole)[-1]["kind"] == "run_finished"
    assert console.heard[-1] == "the tracking server refused event 3"


def datasets(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {e["data"]["name"]: e["data"] for e in found if e["kind"] == "dataset"}


def test_parents_are_named_with_the_digest_that_was_read(whole: Line) -> None:
    first = datasets(start(whole))
    whole.tree["score"] = {"max_new_tokens": 9}
    whole.workers.scripts["base"] = Script(lambda prompt: "a new thing", lambda pair: -3.0)
    second = datasets(start(whole))
    whole.tree["score"] = {}  # the last entry of `score` is now of other settings
    whole.tree["select"] = {"budget": 1}
    third = datasets(start(whole))
    assert "score.scores" not in third
    assert second["score.scores"]["digest"] != first["score.scores"]["digest"]
    [read] = [p for p in third["select.selections"]["parents"] if p["name"] == "score.scores"]
    assert read["digest"] == first["score.scores"]["digest"]


def test_a_kill_just_after_a_stage_loses_no_event(whole: Line) -> None:
    with pytest.raises(Killed):
        start(whole, Killer("deploy"))
    assert "stage_finished deploy" not in kinds(events(whole))
    assert kinds(start(whole)) == [
        *("run_started", "stage_started deploy", "dataset deploy", "model deploy"),
        *("promote deploy", "stage_finished deploy", "artifact", "run_finished"),
    ]
    assert start(whole) == []


def test_a_kill_amid_the_events_of_a_stage_tells_them_again(whole: Line) -> None:
    start(whole)
    told = [e for e in events(whole) if e["kind"] == "model"]
    cut_before(whole, "stage_finished", "deploy")
    found = start(whole)
    [again] = [e for e in found if e["kind"] == "model"]
    assert kinds(found)[-1] == "run_finished"
    assert again["data"] == told[0]["data"]
    assert len(again["data"]["digest"]) == 16  # by which the server knows it
    evaluate = whole.recipe.evaluate
    decoding = {"max_new_tokens": evaluate.max_new_tokens, "stop": list(evaluate.stop)}
    assert again["data"]["decoding"] == decoding
    manifest = folder_of(whole).absolute(again["data"]["path"]) / "stillhouse.json"
    assert again["data"]["tags"]["stillhouse.manifest"] == sha256_of(manifest)
    assert start(whole) == []


def test_a_kill_between_the_report_and_its_event_loses_nothing(whole: Line) -> None:
    start(whole)
    report = folder_of(whole).report.read_bytes()
    cut_before(whole, "artifact", None)
    assert kinds(start(whole)) == ["run_started", "artifact", "run_finished"]
    assert folder_of(whole).report.read_bytes() == report
    assert start(whole) == []


def cut_before(line: Line, kind: str, stage: str | None) -> None:
    """Take the event and all that follow it out of the log, as a kill before it would."""
    path = folder_of(line).events
    found = events(line)
    [first] = [n for n, e in enumerate(found) if (e["kind"], e["stage"]) == (kind, stage)]
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:first]))


def test_a_run_that_was_not_tracked_is_told_afterwards(whole: Line) -> None:
    whole.run()
    found = start(whole)
    stages = [stage.name for stage in whole.runner().stages()]
    assert kinds(found)[0] == "run_started"
    assert kinds(found, "stage_finished") == [f"stage_finished {stage}" for stage in stages]
    assert kinds(found)[-1] == "run_finished"
    assert start(whole) == []


def test_a_stage_that_was_done_anew_is_told_anew(whole: Line) -> None:
    """`--resume never` does a stage again under the same key."""
    start(whole, until="ingest")
    with pytest.raises(Killed):
        start(whole, Killer("ingest"), resume="never", until="ingest")
    assert "stage_finished ingest" in kinds(start(whole, until="ingest"))


def test_settings_gone_back_to_end_with_their_own_result(whole: Line) -> None:
    start(whole)
    whole.tree["deploy"] = {"questions": 1}
    start(whole)
    whole.tree["deploy"] = {}
    whole.run()  # not tracked: the report is as it was, and the server's last word is the other's
    found = start(whole)
    assert kinds(found) == ["run_started", "artifact", "run_finished"]


def test_settings_and_figures_are_told_nested(whole: Line) -> None:
    """How they are named on a server is for the upload to say."""
    found = start(whole)
    [params] = [e["data"]["params"] for e in found if e["kind"] == "run_started"]
    assert params == whole.recipe.model_dump(mode="json")
    [section] = [e["data"]["params"] for e in found if kinds([e]) == ["stage_started evaluate"]]
    assert section == whole.recipe.evaluate.model_dump(mode="json")
    [counts] = [e["data"]["counts"] for e in found if kinds([e]) == ["stage_finished score"]]
    assert counts == asdict(whole.entry("score").counts)
    report = json.loads(folder_of(whole).report.read_text())
    metrics = found[-1]["data"]["metrics"]
    assert metrics.keys() >= {"accuracy", "perplexity", "recovery", "cache"}
    assert metrics == {name: report[name] for name in metrics}


def test_events_name_files_by_their_place_in_the_run_folder(whole: Line) -> None:
    start(whole)
    moved = RunFolder(folder_of(whole).root.rename(whole.home / "elsewhere"))
    paths = {e["kind"]: e["data"]["path"] for e in read(moved) if "path" in e["data"]}
    assert paths.keys() == {"dataset", "model", "artifact"}
    for path in paths.values():
        assert (moved.root / path).exists()
        assert not Path(path).is_absolute()


@pytest.mark.slow
def test_a_run_folder_that_moved_is_uploaded_from_its_new_place(
    whole: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(whole, until="ingest")
    moved = RunFolder(folder_of(whole).root.rename(whole.home / "elsewhere"))
    monkeypatch.setattr(Tracker, "probe", lambda self: None)
    uri = default_uri(whole.home)
    tracker = Tracker(moved, EventLog(moved), uri, "moved", "line")
    assert tracker.flush() == len(read(moved))
    with mlflow_quiet():
        from mlflow import MlflowClient

        client = MlflowClient(uri, uri)
        runs = client.search_runs([client.get_experiment_by_name("moved").experiment_id])
        by_name = {run.info.run_name: run for run in runs}
        [report] = client.list_artifacts(by_name["line"].info.run_id)
    assert report.path == "report.json"
    sources = [item.dataset.source for item in by_name["ingest"].inputs.dataset_inputs]
    assert sources
    assert all(Path(json.loads(source)["uri"]).is_dir() for source in sources)


class Stopper(Observer):
    """Raises what it was given when a stage starts."""

    def __init__(self, stage: str, error: BaseException) -> None:
        self._stage, self._error = stage, error

    def stage_started(self, stage: str, key: str, reused_shards: int) -> None:
        if stage == self._stage:
            raise self._error


def stopped_at_distill(
    line: Line, error: StillhouseError | KeyboardInterrupt
) -> list[dict[str, Any]]:
    tracking = TrackingObserver(line.recipe, Observer())
    with pytest.raises(type(error)):
        line.runner(Observers((tracking, Stopper("distill", error)))).run()
    tracking.run_stopped(error)
    return events(line)


@pytest.mark.parametrize(
    ("error", "status"), [(TrainingError("loss is NaN"), "failed"), (KeyboardInterrupt(), "killed")]
)
def test_a_stopped_run_says_how_it_and_its_stage_ended(
    whole: Line, error: StillhouseError | KeyboardInterrupt, status: str
) -> None:
    [stage, run] = stopped_at_distill(whole, error)[-2:]
    assert kinds([stage, run]) == ["stage_finished distill", "run_finished"]
    assert stage["data"]["status"] == run["data"]["status"] == status
    again = start(whole)
    assert kinds(again, "stage_started")[0] == "stage_started distill"
    assert again[-1]["data"]["status"] == "finished"
    assert start(whole) == []


def test_a_failed_stage_that_was_finished_untracked_is_told_as_finished(whole: Line) -> None:
    stopped_at_distill(whole, TrainingError("loss is NaN"))
    whole.run()
    [ended] = [e for e in start(whole) if e["kind"] == "stage_finished" and e["stage"] == "distill"]
    assert ended["data"]["status"] == "finished"


def test_a_student_that_fails_the_gate_is_registered_and_not_promoted(whole: Line) -> None:
    whole.workers.scripts["student"] = Script(lambda prompt: "wrong", lambda pair: -0.1)
    whole.tree["evaluate"] = {"gate": {"min_accuracy": 0.5}}
    told = kinds(start(whole))
    assert "model deploy" in told
    assert "promote deploy" not in told


def test_a_finished_run_says_that_events_still_wait(whole: Line) -> None:
    start(whole)
    console = Notes()
    whole.runner(TrackingObserver(whole.recipe, console)).run()
    [note] = console.heard
    assert note.startswith("MLflow cannot be reached: no server in this test. Events are kept in ")
