"""Generation by an endpoint: what is asked, what comes back, faults, waiting."""

import email.utils
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stillhouse.workers.endpoint_reply import LONGEST_WAIT, retry_after, schema_problem
from stillhouse.workers.protocols import Completion, Decoding, Failed, TextGenerator
from tests.workers.endpoint.conftest import GOOD, HOW, KEY, FakeTime, Make, Serve, reasons, texts
from tests.workers.endpoint.server import (
    Behaviour,
    Handler,
    Request,
    ScriptedServer,
    breaks_off,
    hangs,
    resets,
    says,
    status,
    trickles,
    truncated,
)

# What is asked, and what comes back


def test_it_is_a_text_generator(serve: Serve, make: Make) -> None:
    generator: TextGenerator = make(serve())
    assert generator.propose(["a"], HOW) == [Completion("to a", "stop", 5, 10)]
    assert generator.propose([], HOW) == []


def test_a_chat_request(serve: Serve, make: Make) -> None:
    server = serve()
    make(server).propose(["a"], HOW)
    [request] = server.requests
    assert (request.path, request.key) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert 0 <= request.body.pop("seed") < 2**31
    assert request.body == {
        "model": "m",
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 20,
        "temperature": 0.9,
        "stop": ["\n"],
    }


def test_a_completions_request(serve: Serve, make: Make) -> None:
    server = serve()
    model = make(server, api="completions")
    assert texts(model.propose(["a"], Decoding(20))) == ["to a"]
    [request] = server.requests
    assert (request.path, request.prompt) == ("/v1/completions", "a")
    assert "stop" not in request.body


def test_seeds_are_of_the_row_and_the_call(serve: Serve, make: Make) -> None:
    server = serve()
    for seed in (7, 7, 8):
        make(server, concurrency=3).propose(["a", "b", "c"], Decoding(20, seed=seed))
    found = [
        {request.prompt: request.body["seed"] for request in server.requests[start : start + 3]}
        for start in (0, 3, 6)
    ]
    assert found[0] == found[1]
    assert len({*found[0].values(), *found[2].values()}) == 6


def test_no_key_is_sent_where_none_is_named(
    serve: Serve, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    server = serve()
    make(server, key_env=None).propose(["a"], HOW)
    make(server).propose(["a"], HOW)
    assert [request.key for request in server.requests] == [None, f"Bearer {KEY}"]


@pytest.mark.parametrize(
    ("text", "finish", "kept"),
    [
        (" one\ntwo", "length", ("one", "stop")),  # a server that knows no stop strings
        (" one ", "length", ("one", "length")),
        ("one", "stop", ("one", "stop")),
    ],
)
def test_where_an_answer_ends(
    text: str, finish: str, kept: tuple[str, str], serve: Serve, make: Make
) -> None:
    [answer] = make(serve(then=says(text, finish))).propose(["a"], HOW)
    assert isinstance(answer, Completion)
    assert (answer.text, answer.finish) == kept


def test_another_end_is_a_failure(serve: Serve, make: Make) -> None:
    server = serve(then=says("no", "content_filter"))
    assert reasons(make(server).propose(["a"], HOW)) == [
        "endpoint: the answer ended with 'content_filter'"
    ]
    assert len(server.requests) == 1


# Order and concurrency


def test_answers_are_in_order_and_requests_are_bounded(serve: Serve, make: Make) -> None:
    together, lock = threading.Barrier(4), threading.Lock()
    under_way, most = 0, 0

    def behave(handler: Handler, request: Request) -> None:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        order = together.wait(5)  # passes once four requests are under way
        threading.Event().wait(0.01 * order)  # not in the order they came
        with lock:
            under_way -= 1
        GOOD(handler, request)

    prompts = [f"p{index}" for index in range(12)]
    answers = make(serve(then=behave), concurrency=4).propose(prompts, HOW)
    assert texts(answers) == [f"to {prompt}" for prompt in prompts]
    assert most == 4


# Faults of one row

EMPTY = says(" ")
FAULTS: dict[str, tuple[Behaviour, str]] = {
    "hangs": (hangs, "endpoint: ReadTimeout: "),
    "trickles": (trickles, "endpoint: Timeout: the answer was not whole in time"),
    "resets": (resets, "endpoint: ConnectionError: [Errno 104]"),
    "breaks off": (breaks_off, "endpoint: ChunkedEncodingError: IncompleteRead"),
    "429": (status(429, Retry_After="7"), "endpoint: 429 no"),
    "500": (status(500), "endpoint: 500 no"),
    "502": (status(502), "endpoint: 502 no"),
    "503": (status(503), "endpoint: 503 no"),
    "504": (status(504), "endpoint: 504 no"),
    "truncated": (truncated, "malformed: expected JSON"),
    "no choices": (status(200, '{"error": "busy"}'), "malformed: expected a choice with text and"),
    "choices of none": (status(200, '{"choices": []}'), "malformed: "),
    "deep": (status(200, "[" * 100_000), "malformed: expected JSON"),
    "half a character": (says("a\ud800"), "malformed: expected text"),
    "empty": (EMPTY, "empty"),
    "no content": (says(None, "length"), "empty: no text within max_new_tokens"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_tried_again(fault: str, serve: Serve, make: Make) -> None:
    server = serve(FAULTS[fault][0])
    assert texts(make(server, timeout=0.3).propose(["a", "b"], HOW)) == ["to a", "to b"]
    assert [request.prompt for request in server.requests] == ["a", "a", "b"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lasting_fault_ends_its_row_only(fault: str, serve: Serve, make: Make) -> None:
    behaviour, reason = FAULTS[fault]
    server = serve(behaviour, behaviour, behaviour)
    failed, answer = make(server, timeout=0.15).propose(["a", "b"], HOW)
    assert isinstance(failed, Failed)
    assert failed.reason.startswith(reason)
    assert texts([answer]) == ["to b"]
    assert len(server.requests) == 4


@pytest.mark.parametrize("code", [400, 404, 422])
def test_a_wrong_request_is_not_repeated(code: int, serve: Serve, make: Make) -> None:
    server = serve(status(code, "max_tokens\n is  odd"))
    answers = make(server).propose(["a", "b"], HOW)
    assert reasons(answers) == [f"endpoint: {code} max_tokens is odd", None]
    assert len(server.requests) == 2


def test_nobody_there(serve: Serve, make: Make, fake: FakeTime) -> None:
    with ScriptedServer((), GOOD) as server:
        model = make(server)
    assert reasons(model.propose(["a"], HOW)) == [
        "endpoint: ConnectionError: [Errno 111] Connection refused"
    ]
    assert len(fake.sleeps) == 2
    assert model.spent == (0, 0, 0)  # nobody can bill what nobody heard


def test_the_transport_has_the_same_seed_and_an_empty_answer_another(
    serve: Serve, make: Make
) -> None:
    server = serve(status(503), EMPTY)
    make(server).propose(["a"], HOW)
    first, second, third = [request.body["seed"] for request in server.requests]
    assert first == second != third


# Waiting


def test_waits_double(serve: Serve, make: Make, fake: FakeTime) -> None:
    make(serve(then=status(500)), retries=9).propose(["a"], HOW)
    bounds = [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert len(fake.sleeps) == len(bounds)
    assert all(most / 2 <= slept <= most for slept, most in zip(fake.sleeps, bounds, strict=True))


@pytest.mark.parametrize("value", ["90", email.utils.formatdate(1e9 + 90, usegmt=True)])
def test_a_server_is_waited_for(value: str, serve: Serve, make: Make, fake: FakeTime) -> None:
    make(serve(status(429, Retry_After=value))).propose(["a"], HOW)
    assert fake.sleeps == [90]


def test_who_does_not_sleep_through_a_pause_waits_for_its_end(
    serve: Serve, make: Make, fake: FakeTime
) -> None:
    fake.deaf = 1
    make(serve(status(429, Retry_After="90"))).propose(["a"], HOW)
    assert fake.sleeps == [90, 90]


@example("nan")
@example("-inf")
@given(st.text() | st.floats().map(str) | st.integers().map(str))
def test_any_retry_after_is_a_bounded_wait(value: str) -> None:
    assert 0 <= retry_after(value, 1e9) <= LONGEST_WAIT


@given(st.integers(0, 600), st.integers(0, 4_000_000_000))
def test_a_date_is_the_seconds_until_then(seconds: int, now: int) -> None:
    date = email.utils.formatdate(now + seconds, usegmt=True)
    assert retry_after(date, now) == seconds == retry_after(str(seconds), now)


# JSON answers

SCHEMA = {
    "type": "object",
    "properties": {"question": {"type": "string"}, "level": {"type": "integer"}},
    "required": ["question", "level"],
}
FITS = '{"question": "why?", "level": 1}'


def test_a_schema_is_sent_and_kept_to(serve: Serve, make: Make) -> None:
    server = serve(then=says(FITS))
    assert texts(make(server).propose(["a"], HOW, schema=SCHEMA)) == [FITS]
    [request] = server.requests
    assert request.body["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True},
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"question": "wh', "expected JSON, found other text"),
        ('["question"]', "expected an object, found list"),
        ('{"question": "why?"}', "no field 'level'"),
        ('{"question": 3, "level": 1}', "expected text in 'question', found int"),
    ],
)
def test_a_misfit_is_worth_one_more_seed(text: str, problem: str, serve: Serve, make: Make) -> None:
    server = serve(says(text), says(text), says(text), then=says(FITS))
    answers = make(server, retries=5).propose(["a", "b"], HOW, schema=SCHEMA)
    assert reasons(answers) == [f"malformed_json: {problem}", None]
    seeds = [request.body["seed"] for request in server.requests]
    assert [request.prompt for request in server.requests] == ["a", "a", "b", "b"]
    assert len(set(seeds)) == 4


@given(st.dictionaries(st.sampled_from("abc"), st.text() | st.integers() | st.none()))
def test_the_schema_check_agrees_with_its_definition(value: dict[str, Any]) -> None:
    schema = {"properties": {"a": {"type": "string"}, "b": {}}, "required": ["a", "b"]}
    fits = isinstance(value.get("a"), str) and "b" in value
    assert (schema_problem(json.dumps(value), schema) is None) == fits


# Rate


def test_requests_are_spaced(serve: Serve, make: Make, fake: FakeTime) -> None:
    make(serve(), requests_per_minute=30).propose(["a", "b", "c", "d"], HOW)
    assert fake.sleeps == [2, 2, 2]
