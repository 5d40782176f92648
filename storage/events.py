"""What happened in a run, in order, for whoever wants to be told: today the tracking server.

A run writes events whether or not a server can be reached; `storage.tracking` uploads those past
its cursor. An upload that is killed before it is acknowledged is repeated, so whoever takes events
must be able to take one twice.

    kind            data
    run_started     params, tags            one per invocation; a resumed run has several
    stage_started   key, params
    metric          name, value, step
    dataset         name, path, digest, rows, source, parents (name and digest of each dataset it
                    was made from)
    stage_finished  key, status ("finished"; "failed"; "killed": interrupted by the user), and of a
                    finished one counts, seconds, tokens
    artifact        path
    model           path, name, task, tags, digest (of its files; the same ones are uploaded once)
    promote         name
    run_finished    status (as a stage's), metrics, report (digest of the file)

Parameters, tags and metrics may be nested. Paths are relative to the run folder, which may move.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from stillhouse.errors import IntegrityError
from stillhouse.storage.durable import replace_file
from stillhouse.storage.journal import Journal, Line
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.redaction import redacted
from stillhouse.storage.strict_json import json_text

Kind = Literal[
    "run_started",
    "stage_started",
    "metric",
    "dataset",
    "stage_finished",
    "artifact",
    "model",
    "promote",
    "run_finished",
]
_KINDS = frozenset(get_args(Kind))


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened. `time` is in milliseconds since 1970, UTC."""

    id: int  # 1, 2, 3 … without gaps: also its line in the file
    time: int
    kind: str
    stage: str | None
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Cursor:
    """The last event that was acknowledged and the byte after it."""

    id: int = 0
    end: int = 0


class EventLog:
    """The event file of a run. One process emits; any may read."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._journal = Journal(folder.events)
        self._last = -1  # id of the last event; unknown until the first is emitted
        self._ends: dict[int, int] = {}  # of events handed out and not yet acknowledged

    def emit(self, kind: Kind, stage: str | None = None, **data: object) -> int:
        """Append an event and return its id. Values that look like credentials are hidden.

        A field's own name hides nothing: the names are ours, and a stage's `key` is no secret.

        All but metrics are on disk on return: a metric a second costs no disk flush each, and a
        kill (unlike a power cut) does not lose it either.
        """
        if kind not in _KINDS:
            raise ValueError(f"expected an event of {sorted(_KINDS)}, found {kind!r}")
        if self._last < 0:
            self._last = sum(1 for _ in self._journal.read())
        event = {
            "id": self._last + 1,
            "time": time.time_ns() // 1_000_000,
            "kind": kind,
            "stage": stage,
            "data": {name: redacted("", value) for name, value in data.items()},
        }
        self._journal.append(event, sync=kind != "metric")
        self._last += 1
        return self._last

    def read(self) -> Iterator[Event]:
        """Yield every event, whoever has taken it."""
        return (self._event(line) for line in self._journal.read())

    def pending(self, cursor_name: str) -> Iterator[Event]:
        """Yield, one at a time, the events after the last acknowledged one."""
        cursor = self._cursor(cursor_name)
        self._ends.clear()
        for line in self._journal.read(cursor.end, cursor.id):
            event = self._event(line)
            self._ends[event.id] = line.end
            yield event

    def acknowledge(self, cursor_name: str, event_id: int) -> None:
        """Record that every event up to `event_id`, handed out by `pending`, has been taken."""
        if event_id not in self._ends:
            raise ValueError(f"event {event_id} was not handed out by pending({cursor_name!r})")
        cursor = {"id": event_id, "end": self._ends[event_id]}
        path = self._folder.tracking / f"{cursor_name}.cursor.json"
        replace_file(path, json_text(cursor, path).encode())
        self._ends = {number: end for number, end in self._ends.items() if number > event_id}

    def _cursor(self, name: str) -> _Cursor:
        path = self._folder.tracking / f"{name}.cursor.json"
        try:
            return _Cursor(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return _Cursor()
        except (ValueError, TypeError) as error:
            raise IntegrityError(
                f"{path}: expected an event's id and end, found {error}. Delete the file: every "
                "event is then uploaded again, to the runs that are already there."
            ) from error

    def _event(self, line: Line) -> Event:
        try:
            event = Event(**cast("dict[str, Any]", line.value))
        except TypeError as error:
            raise IntegrityError(self._misplaced(line)) from error
        if event.id != line.number or not isinstance(event.data, dict):
            raise IntegrityError(self._misplaced(line))
        return event

    def _misplaced(self, line: Line) -> str:
        return (
            f"{self._folder.events}, line {line.number}: expected event {line.number}, found "
            f"{str(line.value)[:80]}. The file was edited; restore it, or delete it together with "
            f"{self._folder.tracking} to lose the history and go on."
        )
