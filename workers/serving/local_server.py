"""A server for this process alone: a free port, a key that nobody else has."""

import secrets
import socket

from stillhouse.workers.cache import PLAN_FOLDER
from stillhouse.workers.protocols import ServedSpec
from stillhouse.workers.serving.serve_job import ServeJob
from stillhouse.workers.serving.served_cache import PLAN, ServedCache
from stillhouse.workers.serving.startable import most_context

_POOL = 1 << 30  # bytes of cache: some hundred short questions at once


def local_job(spec: ServedSpec) -> ServeJob:
    """What to start for it."""
    folder = spec.folder / PLAN_FOLDER if spec.cache == PLAN else None
    return ServeJob(
        folder=spec.folder,
        name="served",
        cache=ServedCache(spec.cache, folder, spec.sinks),
        port=free_port(),
        key=secrets.token_urlsafe(32),
        # What is longer fails alone, as it does in process.
        context=min(spec.context, most_context(spec.folder) or spec.context),
        dtype=spec.dtype,
        pool=_POOL,
        eager=True,
    )


def free_port() -> int:
    """Nobody has it now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
