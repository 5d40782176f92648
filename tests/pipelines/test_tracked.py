"""A tracked run's events: what is written down when, and again after a kill."""

import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse.errors import TrackingError
from stillhouse.pipelines.observer import Observer, Observers
from stillhouse.pipelines.tracked import TrackingObserver
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.tracking import Tracker
from stillhouse.workers.scripted import Script
from tests.pipelines.conftest import Line


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody takes the events: these tests read them from the file."""
    monkeypatch.setattr(Tracker, "probe", lambda self: "no server in this test")


@pytest.fixture
def whole(line: Line) -> Line:
    line.pool("special thing", "another special thing", "common ground")
    line.questions(**{"two words": "C22", "one more word": "A00"})
    line.tree["expand"] = {"rounds": 1, "prompts_per_round": 4}
    return line


class Noter(Observer):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def start(line: Line, *before: Observer, **how: Any) -> list[dict[str, Any]]:
    """Run the line, tracked; return the events that this start wrote."""
    already = len(events(line))
    tracking = TrackingObserver(line.recipe, Observer())
    line.runner(Observers((*before, tracking))).run(**how)
    return events(line)[already:]


def folder_of(line: Line) -> RunFolder:
    return line.runner().folder


def events(line: Line) -> list[dict[str, Any]]:
    path: Path = folder_of(line).events
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
    console = Noter()
    tracking = TrackingObserver(whole.recipe, console)
    assert whole.runner(tracking).run()["stages"].keys() >= {"deploy"}
    assert events(whole)[-1]["kind"] == "run_finished"
    assert console.notes[-1] == "the tracking server refused event 3"


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
