"""The event log: nothing is lost, nothing is handed out twice once acknowledged."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.errors import IntegrityError
from stillhouse.storage.events import EventLog
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.redaction import is_secret, redact_uris
from stillhouse.storage.tracking.fields import clipped, entity_name, flattened, numbers
from stillhouse.storage.tracking.reachability import why_unreachable


def ids(log: EventLog, cursor: str = "c") -> list[int]:
    return [event.id for event in log.pending(cursor)]


def test_events_are_numbered_across_restarts(folder: RunFolder) -> None:
    assert EventLog(folder).emit("run_started", params={"a": 1}, tags={}) == 1
    log = EventLog(folder)
    assert log.emit("metric", "distill", name="loss", value=0.5, step=1) == 2
    first, second = log.pending("c")
    assert (first.kind, first.stage, first.data) == (
        "run_started", None, {"params": {"a": 1}, "tags": {}},
    )  # fmt: skip
    assert (second.stage, second.data["value"]) == ("distill", 0.5)
    assert second.time >= first.time > 1_600_000_000_000


def test_acknowledged_events_are_not_handed_out_again(folder: RunFolder) -> None:
    log = EventLog(folder)
    for step in range(5):
        log.emit("metric", "s", name="loss", value=1.0, step=step)
    assert ids(log) == [1, 2, 3, 4, 5]
    log.acknowledge("c", 3)
    assert ids(EventLog(folder)) == [4, 5]
    assert ids(log, "another server") == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="event 99 was not handed out"):
        log.acknowledge("c", 99)


def test_a_torn_tail_is_cut_off(folder: RunFolder) -> None:
    EventLog(folder).emit("promote", name="m")
    with folder.events.open("ab") as file:
        file.write(b'{"id":2,"time":1,"ki')
    log = EventLog(folder)
    assert ids(log) == [1]
    assert log.emit("promote", name="m") == 2
    assert ids(log) == [1, 2]


def test_an_event_out_of_order_is_refused(folder: RunFolder) -> None:
    log = EventLog(folder)
    log.emit("promote", name="m")
    line = json.loads(folder.events.read_text())
    folder.events.write_text(json.dumps(line | {"id": 7}) + "\n")
    with pytest.raises(IntegrityError, match=r"line 1: expected event 1, found .*'id': 7"):
        ids(log)


def test_an_unknown_kind_is_refused(folder: RunFolder) -> None:
    unknown: Any = "stage_began"
    with pytest.raises(ValueError, match="found 'stage_began'"):
        EventLog(folder).emit(unknown)


def test_credentials_are_never_written(folder: RunFolder) -> None:
    params = {
        "hub_token": "hf_abc123",
        "tracking": {"uri": "https://me:pa55@example.org/x", "password": "pa55"},
        "max_new_tokens": 64,
        "eos_token": "<eos>",
        "key_bits": 4,
    }
    EventLog(folder).emit("run_started", params=params, tags={"list": ["s3://a:pa55@b/c"]})
    text = folder.events.read_text()
    assert "abc123" not in text
    assert "pa55" not in text
    (event,) = EventLog(folder).pending("c")
    assert event.data["params"]["tracking"]["uri"] == "https://[redacted]@example.org/x"
    assert event.data["params"]["max_new_tokens"] == 64
    assert event.data["params"]["eos_token"] == "<eos>"


def test_a_stage_key_is_no_credential(folder: RunFolder) -> None:
    """The server tells the runs of a stage apart by it."""
    log = EventLog(folder)
    log.emit("stage_started", "score", key="1f", params={"api": {"key": "hf_abc123"}})
    (event,) = log.pending("c")
    assert event.data == {"key": "1f", "params": {"api": {"key": "[redacted]"}}}


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("token", True), ("HF_TOKEN", True), ("api_key", True), ("apikey", True), ("s3.key", True),
        ("db_password", True), ("secret_name", True), ("credentials", True),
        ("tokens", False), ("max_tokens", False), ("key_bits", False), ("pad_token", False),
        ("tokenizer", False), ("monkey", False), ("keys", False),
    ],
)  # fmt: skip
def test_names_that_look_like_secrets(name: str, secret: bool) -> None:
    assert is_secret(name) is secret


def test_uris_keep_all_but_their_credentials() -> None:
    found = redact_uris("cannot reach http://user:p@ss@host:80/a?b=c, nor http://host/x@y")
    assert found == "cannot reach http://[redacted]@host:80/a?b=c, nor http://host/x@y"


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1:9/x",
        "http://u:pw@127.0.0.1:9",
        "postgresql+psycopg2://u:pw@127.0.0.1:9/db",
    ],
)
def test_a_server_that_is_not_there_is_described(uri: str) -> None:
    reason = why_unreachable(uri)
    assert reason is not None
    assert "127.0.0.1:9" in reason
    assert "pw" not in reason


def test_nested_settings_become_dotted_names() -> None:
    nested = {"a": {"b": 1, "c": [1, 2]}, "d%e": None, "f": {}}
    assert flattened(nested) == {"a.b": "1", "a.c": "[1, 2]", "d_e": "None"}
    assert numbers({"a": {"b": 1, "c": None}, "d": "x", "e": True}) == {"a.b": 1.0, "e": 1.0}


@given(st.text(max_size=400), st.integers(60, 300))
def test_clipped_text_fits(text: str, limit: int) -> None:
    assert len(clipped(text, limit)) <= limit
    assert len(entity_name(text)) <= 250
    assert clipped(text, 400) == text
