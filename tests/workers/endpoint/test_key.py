"""Who asks an endpoint: its key goes to one host, and into no text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.configs.endpoint import EndpointConfig
from stillhouse.errors import ConfigError, ModelError
from stillhouse.workers.endpoint_http import EndpointClient
from stillhouse.workers.protocols import Failed
from tests.workers.endpoint.conftest import GOOD, HOW, KEY, Make, Serve, reasons
from tests.workers.endpoint.server import (
    Handler,
    Request,
    echoes,
    status,
)


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
