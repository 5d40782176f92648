"""The sqlite file that stands for a tracking server where there is none."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def default_uri(runs_root: Path) -> str:
    """Return the URI used when a recipe names none: a database beside the runs, absolute."""
    return f"sqlite:///{runs_root.resolve() / 'mlflow.db'}"


def sqlite_path(uri: str) -> Path | None:
    """Return the database file of a sqlite URI, None for another kind of URI."""
    kind, _, path = uri.partition(":///")
    return Path(path) if kind.partition("+")[0].lower() == "sqlite" else None


@contextmanager
def created_by_one(uri: str) -> Iterator[None]:
    """Hold other runs off while MLflow makes its tables: two at once fail, and leave half of them.

    The lock is on the database's folder, so it needs no file of its own and dies with its process.
    """
    database = sqlite_path(uri)
    if database is None:  # a server has made its tables before it answers
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(database.parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
