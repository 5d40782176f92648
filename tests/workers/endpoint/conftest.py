"""A client of a real server, with scripted faults, and no waiting for real."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from stillhouse.configs.endpoint import EndpointConfig
from stillhouse.workers.endpoint import EndpointModel
from stillhouse.workers.protocols import Completion, Decoding, Failed
from tests.workers.endpoint.server import (
    Behaviour,
    ScriptedServer,
    says,
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
