"""How many parameters a reference has, from headers alone."""

import json
import struct
from pathlib import Path
from typing import Any

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
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, Any] = json.loads(stream.read(length))
    shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
    return sum(_product(shape) for shape in shapes)


def _product(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
