"""`stillhouse serve` as a user has it: compiled, told to stop, killed, asked to log."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from stillhouse.errors import ConfigError
from stillhouse.pipelines.chatting import ChatServer
from stillhouse.workers.serving.local_server import free_port

START, END = 300, 60  # seconds


@dataclass
class Command:
    """A started `stillhouse serve`, and its client."""

    process: "subprocess.Popen[str]"
    port: int
    home: Path

    @property
    def log(self) -> Path:
        return self.home / "serve" / f"{self.port}.log"

    @property
    def client(self) -> ChatServer:
        key = (self.home / "serve" / f"{self.port}.key").read_text().strip()
        return ChatServer(f"http://127.0.0.1:{self.port}", key)

    def wait_until_ready(self) -> None:
        began = time.monotonic()
        while time.monotonic() - began < START:
            assert self.process.poll() is None, self.process.communicate()[1]
            if is_healthy(self.port):
                return
            time.sleep(0.5)
        raise AssertionError("it does not answer")


def is_healthy(port: int) -> bool:
    try:
        return requests.get(f"http://127.0.0.1:{port}/health", timeout=5).ok
    except requests.RequestException:
        return False


def is_listening(port: int) -> bool:
    """A busy server may be slow to say that it is healthy; one that ended refuses."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


Serve = Callable[..., Command]


@pytest.fixture
def serve(smollm2: Path, environment: None, tmp_path: Path) -> Iterator[Serve]:
    started: list[Command] = []

    def start(*options: str, port: int | None = None) -> Command:
        port = port or free_port()
        words = ["--port", str(port), "--cache", "k4v4", "--cache-gib", "0.2",
                 "--max-context", "1024", *options]  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-m", "stillhouse", "serve", str(smollm2), *words],
            env=os.environ | {"STILLHOUSE_CACHE": str(tmp_path)},
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(Command(process, port, tmp_path))
        started[-1].wait_until_ready()
        return started[-1]

    yield start
    for command in started:
        command.process.kill()
        command.process.communicate()


@pytest.mark.timeout(600)
def test_told_to_stop_it_finishes_what_is_under_way(serve: Serve) -> None:
    command = serve("--log-prompts")
    body = {"model": command.client.model(), "prompt": "A logged sentence.", "stream": True}
    body |= {"max_tokens": 200, "ignore_eos": True, "temperature": 0}
    url, key = f"http://127.0.0.1:{command.port}/v1/completions", command.client.key
    headers = {"Authorization": f"Bearer {key}"}
    with requests.post(url, json=body, headers=headers, stream=True, timeout=END) as answer:
        lines = filter(None, answer.iter_lines())
        early = [next(lines) for _ in range(3)]
        command.process.send_signal(signal.SIGTERM)
        pieces = [*early, *lines]
    assert pieces[-1] == b"data: [DONE]"
    assert len(pieces) == 200 + 1
    assert command.process.wait(END) == 0
    assert not is_listening(command.port)
    assert "A logged sentence." in command.log.read_text(errors="replace")
    assert stat.S_IMODE(command.log.stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="expected a server at"):
        command.client.model()


@pytest.mark.timeout(600)
def test_killed_its_engine_ends_and_the_port_is_free_again(serve: Serve) -> None:
    command = serve("--eager")
    name = command.client.model()
    said = "".join(command.client.complete(name, "One, two, three,", 4))
    command.process.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    while is_listening(command.port):
        assert time.monotonic() - killed < END
        time.sleep(0.5)
    again = serve("--eager", port=command.port)
    assert "".join(again.client.complete(name, "One, two, three,", 4)) == said
