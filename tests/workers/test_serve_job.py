"""What an engine is started with: never the key for all to see, never a public address without."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse.errors import ModelError
from stillhouse.workers.serving import serve_job
from stillhouse.workers.serving.key_middleware import RequireKey
from stillhouse.workers.serving.serve_job import ServeJob, default_pool, server_url
from stillhouse.workers.serving.served_cache import ServedCache
from stillhouse.workers.serving.startable import is_loopback, most_context

KEY = "sk-nobody-knows"


def job(cache: str = "k4v4", **options: Any) -> ServeJob:
    given: dict[str, Any] = {"key": KEY, "pool": 1 << 20} | options
    return ServeJob(Path("model"), "name", ServedCache(cache), 8000, **given)


def test_the_key_is_in_the_environment_alone() -> None:
    assert not [word for word in job().command() if KEY in word]
    assert job().environment()["VLLM_API_KEY"] == KEY
    assert "--middleware" in job().command()
    assert "--middleware" not in job(key=None).command()


def test_another_key_and_routes_for_developers_are_not_inherited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "another")
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    found = job(key=None).environment()
    assert "VLLM_API_KEY" not in found
    assert "VLLM_SERVER_DEV_MODE" not in found


@pytest.mark.parametrize(
    ("plugins", "wanted"),
    [(None, None), ("", "stillhouse"), ("lora_resolver", "lora_resolver,stillhouse")],
)
def test_our_plugin_is_among_those_that_are_loaded(
    plugins: str | None, wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if plugins is not None:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    assert job().environment().get("VLLM_PLUGINS") == wanted


def test_prompts_are_logged_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    assert job().environment()["VLLM_LOGGING_LEVEL"] == "INFO"
    assert "--enable-log-requests" not in job().command()
    asked = job(log_prompts=True)
    assert asked.environment()["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert "--enable-log-requests" in asked.command()


def test_blocks_are_ours_where_the_cache_is() -> None:
    assert "--block-size" in job().command()
    assert "--block-size" not in job("bf16").command()


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("localhost", True), ("127.0.0.1", True), ("127.8.8.8", True), ("::1", True),
        ("0.0.0.0", False), ("::", False), ("127.example.com", False), ("10.0.0.1", False),
        ("", False),
    ],
)  # fmt: skip
def test_loopback(host: str, own: bool) -> None:
    assert is_loopback(host) == own


def test_urls() -> None:
    assert server_url("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert server_url("::1", 80) == "http://[::1]:80"
    assert job(host="localhost").url == "http://localhost:8000"


def test_the_pool_is_a_quarter_of_what_a_container_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_job, "_container_limit", lambda: [400])
    assert default_pool() == 100
    monkeypatch.setattr(serve_job, "_container_limit", list)
    assert (default_pool() or 0) > 1 << 20


def test_a_context_that_nobody_knows(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for config, wanted in (
        ({"max_position_embeddings": 64}, 64),
        ({"text_config": {"max_position_embeddings": 32}}, 32),
        ({"text_config": None, "max_position_embeddings": 16}, 16),
        ({}, None),
    ):
        path.write_text(json.dumps(config))
        assert most_context(tmp_path) == wanted
    path.write_text("[1]")
    with pytest.raises(ModelError, match="expected a JSON object, found list"):
        most_context(tmp_path)


def answered(path: str, headers: list[tuple[bytes, bytes]], **scope: Any) -> int:
    """The status that the middleware gives."""
    return int(messages(path, headers, **scope)[0]["status"])


def messages(path: str, headers: list[tuple[bytes, bytes]], **scope: Any) -> list[Any]:
    """What it sends, before an application that always gives 200."""
    sent: list[Any] = []

    async def application(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    found = {"type": "http", "method": "POST", "path": path, "headers": headers} | scope
    asyncio.run(RequireKey(application)(found, receive, send))
    return sent


@pytest.mark.parametrize("path", ["/v1/models", "/invocations", "/tokenize", "/", "/healthy"])
def test_every_route_asks_for_the_key(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    assert answered(path, []) == 401
    assert answered(path, [(b"authorization", b"Bearer another")]) == 401
    assert answered(path, [(b"authorization", f"Basic {KEY}".encode())]) == 401
    assert answered(path, [(b"authorization", f"Bearer {KEY}".encode())]) == 200


@pytest.mark.parametrize("path", ["/health", "/ping", "/metrics", "/metrics/"])
def test_but_for_health_and_metrics(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    assert answered(path, []) == 200
    assert answered("/root" + path, [], root_path="/root") == 200
    assert answered("/v1/models", [], method="OPTIONS") == 200


def test_a_socket_without_the_key_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    sent = messages("/v1/realtime", [], type="websocket")
    assert sent == [{"type": "websocket.close", "code": 1008}]
