"""How many parameters a reference has, from headers alone."""

import json
from math import prod
from pathlib import Path
from typing import Any

from stillhouse.errors import ModelError
from stillhouse.workers.models import toy
from stillhouse.workers.models.gguf_header import read_header
from stillhouse.workers.models.refs import locate, parse


def parameters(ref: str) -> int:
    """Elements of all tensors; for a toy, those outside its embedding."""
    parsed = parse(ref)
    if parsed.scheme == "toy":
        made = toy.spec(parsed.body)
        attention = 2 * made.hidden * made.head_dim * (made.heads + made.kv_heads)
        return made.layers * (attention + 3 * made.hidden * made.mlp)
    pieces = [file.pieces[0] for file in locate(ref)]  # a header lies in the first piece
    weights = [path for path in pieces if path.suffix == ".safetensors"]
    if weights:
        return sum(_safetensors(path) for path in weights)
    return sum(read_header(path).parameters for path in pieces if ".gguf" in path.name)


def _safetensors(path: Path) -> int:
    header = _safetensors_header(path)
    try:
        return sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (KeyError, TypeError) as error:
        raise _damaged(path, "a shape of each tensor", repr(error)) from error


def _safetensors_header(path: Path) -> dict[str, Any]:
    """Eight bytes say how long the JSON after them is."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise _damaged(path, f"a header of {length:,} bytes", f"a file of {size:,}")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "a header in JSON", str(error)) from error
    if not isinstance(header, dict):
        raise _damaged(path, "a JSON object as header", type(header).__name__)
    return header


def _damaged(path: Path, expected: str, found: str) -> ModelError:
    return ModelError(
        f"{path}: expected {expected}, found {found}. It was cut short or changed: fetch it again"
    )
