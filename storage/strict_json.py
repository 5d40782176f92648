"""JSON that any program reads: it has no NaN and no Infinity, which Python's own writer lets by."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from stillhouse.errors import StillhouseError


def json_text(value: object, target: Path, indent: int | None = None) -> str:
    """Return `value` as JSON for the file `target`, in one line unless there is an `indent`.

    Raises StillhouseError, naming each number that is not finite.
    """
    separators = (",", ":") if indent is None else None
    try:
        return json.dumps(value, indent=indent, separators=separators, allow_nan=False)
    except ValueError as error:
        found = ", ".join(_not_finite(value, ""))
        raise StillhouseError(
            f"{target}: expected finite numbers, found {found}; nothing of it was written. JSON "
            "holds no such number: whoever computed it has to refuse it or leave it out. Weights "
            "or measures that overflow their dtype are the usual cause."
        ) from error


def _not_finite(value: object, name: str) -> Iterator[str]:
    """Yield `name = value` of each number that is not finite, with dots between the names."""
    if isinstance(value, float):
        if not math.isfinite(value):
            yield f"{name.removeprefix('.')} = {value}"
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _not_finite(inner, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _not_finite(inner, f"{name}.{index}")
