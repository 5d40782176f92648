"""A server as a process of its own: vLLM with our plugin, watched from outside."""

import ctypes
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import requests

from stillhouse.errors import ModelError
from stillhouse.workers.serving.serve_job import ServeJob
from stillhouse.workers.serving.served_cache import HALF
from stillhouse.workers.serving.startable import require_startable

SERVES_PACKED = "stillhouse: packed cache"  # what the plugin logs once layers are packed
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG, linux/prctl.h
_ENDING = 1 << 16  # bytes of a log that say why a server ended
_POLL = 0.5  # seconds
_LIBC = ctypes.CDLL(None)  # loaded here: not in a child that was just forked


@dataclass
class ServerProcess:
    """A started server. log: a file that its output goes to, appended."""

    job: ServeJob
    log: Path
    _process: "subprocess.Popen[bytes]" = field(init=False)
    _from: int = field(init=False)

    def __post_init__(self) -> None:
        require_startable(self.job)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab", opener=_for_its_owner) as out:
            self._from = out.tell()
            self._process = subprocess.Popen(
                self.job.command(),
                env=self.job.environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is ours to pass on
                preexec_fn=partial(_die_with_parent, os.getpid()),
            )

    @property
    def pid(self) -> int:
        """Of the engine's front end."""
        return self._process.pid

    def wait_until_ready(
        self, timeout: float = 900, waiting: Callable[[float], None] = lambda _seconds: None
    ) -> None:
        """Until it answers. ModelError, with what it said, when it ends before or takes longer."""
        began = time.monotonic()
        while (seconds := time.monotonic() - began) < timeout:
            if self._process.poll() is not None:
                raise ModelError(f"serve: the server ended before it was ready: {self.complaint()}")
            if self.is_healthy():
                self._require_cache()
                return
            waiting(seconds)
            time.sleep(_POLL)
        self.kill()
        raise ModelError(
            f"serve: expected an answer within {timeout:.0f} s, found none; see {self.log}"
        )

    def is_healthy(self) -> bool:
        """Whether it answers health checks."""
        try:
            return requests.get(f"{self.job.url}/health", timeout=5).status_code == 200
        except requests.RequestException:
            return False

    def _require_cache(self) -> None:
        """ModelError, and the server's end, where the engine went on without our plugin."""
        if self.job.cache.format == HALF or SERVES_PACKED in self._said(None):
            return
        self.kill()
        raise ModelError(
            "serve: expected the engine to load the plugin `stillhouse` and to pack the cache, "
            f"found that it did not; see {self.log}"
        )

    def _said(self, last: int | None) -> str:
        """What it logged, or the last so many bytes of that."""
        with self.log.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(self._from if last is None else max(self._from, end - last))
            return log.read().decode(errors="replace")

    def complaint(self) -> str:
        """The first error of ours at the end of its log, else its last line."""
        text = self._said(_ENDING)
        others = re.findall(r"(?:ValueError|RuntimeError): (.+)", text)
        lines = [line for line in text.splitlines() if line.strip()]
        mine = re.findall(r"(?:ModelError|ConfigError): (.+)", text)
        said = mine[:1] or others[:1] or lines[-1:] or ["nothing"]
        return f"{said[0][:600]} (all of it: {self.log})"

    def wait(self) -> int:
        """Until it ends by itself; its exit code."""
        return self._process.wait()

    def stop(self, timeout: float | None = None) -> int:
        """Let it finish what is under way, then end it; its exit code."""
        self.terminate()
        try:
            return self._process.wait(self.job.drain + 30 if timeout is None else timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._process.wait()

    def terminate(self) -> None:
        """Tell it to finish what is under way and end."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """At once, with all its children."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self._process.wait()


def _for_its_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _die_with_parent(parent: int) -> None:
    """In the child, before it becomes the server: told to end when its parent has ended."""
    _LIBC.prctl(_DIES_WITH_PARENT, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before that
        os._exit(1)
