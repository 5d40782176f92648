"""How our values fit into MLflow's fields: names, lengths, numbers."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import TypeVar

from stillhouse.errors import ConfigError

T = TypeVar("T")

MAX_BATCH = 100  # parameters or tags a request
MAX_METRICS = 1000  # a request
_NAME, _VALUE = 250, 6000  # characters
_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]")


def clipped(text: str, limit: int) -> str:
    """Return `text`, cut to `limit` characters with a note of its length and hash when longer."""
    if len(text) <= limit:
        return text
    digest = hashlib.sha256(text.encode(errors="replace")).hexdigest()[:12]
    note = f"… ({len(text)} characters, sha256 {digest})"
    return text[: limit - len(note)] + note


def entity_name(name: str) -> str:
    """Return `name` with only the characters that MLflow allows in names."""
    return _NOT_IN_NAMES.sub("_", clipped(name, _NAME)) or "_"


def digest_of(sha256: str) -> str:
    """Return a digest that fits MLflow's 36 characters."""
    return sha256[:36]


def dataset_id(data: Mapping[str, object]) -> str:
    """Return what tells a dataset's contents apart: its name and digest."""
    return f"{data['name']}@{digest_of(str(data['digest']))}"


def flattened(value: object, prefix: str = "") -> dict[str, str]:
    """Return nested settings as `a.b.c: text`; lists are written as they are."""
    if not isinstance(value, Mapping):
        return {entity_name(prefix): clipped(str(value), _VALUE)} if prefix else {}
    flat: dict[str, str] = {}
    for name, inner in value.items():
        flat |= flattened(inner, f"{prefix}.{name}" if prefix else str(name))
    return flat


def numbers(values: Mapping[str, object], prefix: str = "") -> dict[str, float]:
    """Return the numbers of a nested mapping as `a.b.c: number`; what is none is left out."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        path = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, Mapping):
            flat |= numbers(value, path)
        elif isinstance(value, int | float):
            flat[path] = float(value)
    return flat


def parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield `items` in pieces of at most `size`."""
    return (items[start : start + size] for start in range(0, len(items), size))


def release(package: str) -> str:
    """Return an installed package's version as an index has it: 2.13.0, not 2.13.0+cpu."""
    return version(package).partition("+")[0]


def quoted(name: str) -> str:
    """Return `name` as a string of MLflow's filter language, which has no escape."""
    if "'" in name:
        raise ConfigError(f"a registered model's name may hold no quotes, found {name!r}")
    return f"'{name}'"
