"""Generation by an endpoint: a real server, scripted faults, no waiting for real."""

import email.utils
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stillhouse.configs.endpoint import EndpointConfig
from stillhouse.errors import ConfigError, IntegrityError, ModelError
from stillhouse.workers.endpoint import EndpointModel
from stillhouse.workers.endpoint_http import EndpointClient
from stillhouse.workers.endpoint_reply import LONGEST_WAIT, retry_after, schema_problem
from stillhouse.workers.protocols import Completion, Decoding, Failed, TextGenerator
from tests.workers.endpoint_server import (
    Behaviour,
    Handler,
    Request,
    ScriptedServer,
    breaks_off,
    echoes,
    hangs,
    resets,
    says,
    status,
    trickles,
    truncated,
)

KEY = "sk-nobody/knows+this=0123456789"
HOW = Decoding(max_new_tokens=20, stop=("\n",), temperature=0.9, seed=7)
GOOD = says("to {}")


class FakeTime:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.sleeps: list[float] = []
        self.deaf = 0  # so many sleeps end at once
        self._lock = threading.Lock()

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.sleeps.append(seconds)
            self.now += 0 if self.deaf else seconds
            self.deaf = max(0, self.deaf - 1)


Serve = Callable[..., ScriptedServer]


@pytest.fixture
def serve() -> Iterator[Serve]:
    with ExitStack() as stack:

        def started(*script: Behaviour, then: Behaviour = GOOD) -> ScriptedServer:
            return stack.enter_context(ScriptedServer(script, then))

        yield started


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)


@pytest.fixture
def fake() -> FakeTime:
    return FakeTime()


Make = Callable[..., EndpointModel]


@pytest.fixture
def make(tmp_path: Path, fake: FakeTime) -> Make:
    def made(server: ScriptedServer, **options: Any) -> EndpointModel:
        given: dict[str, Any] = {"key_env": "TEST_KEY", "retries": 2, "concurrency": 1}
        config = EndpointConfig(url=server.url, model="m", **(given | options))
        journal = tmp_path / "spending.jsonl"
        return EndpointModel(config, journal, clock=fake.clock, sleep=fake.sleep, now=lambda: 1e9)

    return made


def reasons(answers: Sequence[Completion | Failed]) -> list[str | None]:
    return [answer.reason if isinstance(answer, Failed) else None for answer in answers]


def texts(answers: Sequence[Completion | Failed]) -> list[str | None]:
    return [answer.text if isinstance(answer, Completion) else None for answer in answers]


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


# Who asks


@pytest.mark.parametrize("code", [401, 403])
def test_a_refused_key_ends_the_call(code: int, serve: Serve, make: Make) -> None:
    server = serve(GOOD, then=echoes(code))
    with pytest.raises(ModelError, match="environment variable TEST_KEY") as caught:
        make(server, concurrency=2).propose(["a"] * 50, HOW)
    assert str(code) in str(caught.value)
    assert KEY not in str(caught.value)
    assert len(server.requests) <= 4


def test_a_refused_key_ends_rows_that_still_try(serve: Serve, make: Make) -> None:
    def behave(handler: Handler, request: Request) -> None:
        status(401 if request.prompt == "b" else 500)(handler, request)

    server = serve(then=behave)
    with pytest.raises(ModelError):
        make(server, concurrency=2, retries=1000).propose(["a", "b"], HOW)
    assert len(server.requests) < 900


def test_a_key_that_is_asked_for(serve: Serve, make: Make) -> None:
    with pytest.raises(ModelError, match=r"Set endpoint\.key_env"):
        make(serve(then=status(401)), key_env=None).propose(["a"], HOW)


@pytest.mark.parametrize("value", [None, "", " ", "two words", "ab\nInjected: yes", "schlüssel"])
def test_a_key_that_cannot_be_sent(
    value: str | None, serve: Serve, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TEST_KEY")
    if value is not None:
        monkeypatch.setenv("TEST_KEY", value)
    server = serve()
    with pytest.raises(ConfigError, match="variable TEST_KEY, found") as caught:
        make(server)
    assert not value or not value.strip() or value not in str(caught.value)
    assert not server.requests


@pytest.mark.parametrize("code", [200, 302, 400, 418, 429, 500])
@pytest.mark.parametrize("before", ["you sent ", "x" * 280])  # the key lies across the cut
def test_an_echoed_key_is_hidden(code: int, before: str, serve: Serve, make: Make) -> None:
    [answer] = make(serve(then=echoes(code, before))).propose(["a"], HOW)
    assert isinstance(answer, Failed)
    assert "nobody" not in answer.reason


@given(st.text(), st.text(), st.sampled_from([KEY, KEY.replace("/", "%2F").replace("+", "%2B")]))
def test_the_key_is_in_no_reason(before: str, after: str, form: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_KEY", KEY)
        config = EndpointConfig(url="http://localhost/v1", model="m", key_env="TEST_KEY")
        told = EndpointClient(config).told(f"{before} {form} {after}")
    assert "nobody" not in told
    assert len(told) <= 301


def test_a_redirect_carries_nothing(serve: Serve, make: Make) -> None:
    other = serve()
    port = other.server_port
    # Another host by name; the same machine.
    server = serve(*[status(code, Location=f"http://localhost:{port}/v1") for code in (302, 307)])
    answers = make(server).propose(["a", "b", "c"], HOW)
    assert [(reason or "")[:36] for reason in reasons(answers)] == [
        "endpoint: 302 redirects to localhost",
        "endpoint: 307 redirects to localhost",
        "",
    ]
    assert not other.requests


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


# Money


def test_spending_is_what_the_server_says(serve: Serve, make: Make) -> None:
    prices = {"price_per_million_prompt_tokens": 2, "price_per_million_completion_tokens": 10}
    hidden = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 18}  # 3 of reasoning
    server = serve(says("x", usage=hidden), says(" "), status(500), status(422))
    model = make(server, **prices)
    model.propose(["a", "b"], HOW)
    prompt, completion, cost = model.spent
    assert (prompt, completion) == (20, 13)
    assert cost == pytest.approx((20 * 2 + 13 * 10) / 1e6)


@pytest.mark.parametrize(
    "behaviour",
    [
        says("x", usage=None),
        says("x", usage={"prompt_tokens": "10", "completion_tokens": -1}),
        hangs,
        truncated,
        status(502),
    ],
)
def test_what_nobody_counted_counts_as_the_most(
    behaviour: Behaviour, serve: Serve, make: Make
) -> None:
    model = make(serve(behaviour), retries=0, timeout=0.15)
    model.propose(["a" * 300], HOW)
    prompt, completion, cost = model.spent
    assert 100 < prompt < 200
    assert (completion, cost) == (20, 0)


def test_a_budget_holds_over_processes(serve: Serve, make: Make) -> None:
    server = serve(then=says("x", usage=(40, 20)))
    first = make(server, max_tokens_spent=350)
    assert texts(first.propose(["a"] * 3, HOW)) == ["x"] * 3
    second = make(server, max_tokens_spent=350)
    assert second.spent == (120, 60, 0.0)
    answers = second.propose(["b"] * 3, HOW)
    # 180 of 350 are spent, and one request may take some 160.
    assert texts(answers) == ["x", None, None]
    for reason in reasons([*answers[1:], *second.propose(["c"], HOW)]):
        assert (reason or "").startswith("over_budget: spent 240 of 350 tokens; the next request")
    assert len(server.requests) == 4


def test_a_request_that_a_kill_cut_off_is_counted(serve: Serve, make: Make, tmp_path: Path) -> None:
    killed: list[str] = []

    def behave(handler: Handler, request: Request) -> None:
        killed.append((tmp_path / "spending.jsonl").read_text())
        GOOD(handler, request)

    server = serve(then=behave)
    make(server).propose(["a"], HOW)
    (tmp_path / "spending.jsonl").write_text(killed[0])  # as it lay while the request was under way
    model = make(server)
    assert model.spent[0] > 100
    assert model.spent[1:] == (20, 0)
    model.propose(["a"], HOW)
    assert make(server).spent == (model.spent[0], 25, 0) == model.spent


def test_a_damaged_journal_is_refused(serve: Serve, make: Make, tmp_path: Path) -> None:
    (tmp_path / "spending.jsonl").write_text("edited\n{}\n")
    with pytest.raises(IntegrityError, match="line 1"):
        make(serve())


@pytest.mark.parametrize("bound", [{"max_tokens_spent": 400}, {"max_cost": 0.0004}])
def test_requests_at_once_do_not_overshoot(
    bound: dict[str, float], serve: Serve, make: Make
) -> None:
    prices = {"price_per_million_prompt_tokens": 1, "price_per_million_completion_tokens": 1}
    server = serve(then=says("x", usage=(40, 20)))
    model = make(server, concurrency=8, **bound, **prices)
    answers = model.propose(["a"] * 30, HOW)
    prompt, completion, _ = model.spent
    assert prompt + completion <= 400
    # One that would fit when others took less than they reserved waits for them.
    assert texts(answers).count("x") == len(server.requests) == 5
    assert reasons(answers).count(None) == 5
