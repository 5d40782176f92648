"""The header of a GGUF file: its metadata, its tensors, and how long the file must be.

Read by hand (specification: ggml docs/gguf.md, version 3): the gguf package's reader maps the
tensors as it goes and answers a file that was cut short with an unrelated numpy error.
"""

import struct
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import BinaryIO

from stillhouse.errors import ModelError

_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_LONGEST = 1 << 28  # bytes of a string


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor as the header lists it; `offset` counts from the start of the data."""

    name: str
    elements: int
    kind: int  # ggml type
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata (arrays as their length), tensors, and where their data begins."""

    metadata: dict[str, object]
    tensors: tuple[TensorEntry, ...]
    data_start: int

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.elements for tensor in self.tensors)

    @cached_property
    def expected_size(self) -> int:
        """Bytes the file must have for its last tensor to be whole."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        end = 0
        for tensor in self.tensors:
            block, width = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
            end = max(end, tensor.offset + tensor.elements // block * width)
        return self.data_start + end


def read_header(path: Path) -> GgufHeader:
    """Read the header; raises ModelError when the file is no GGUF or ends inside the header."""
    with path.open("rb") as stream:
        magic = stream.read(4)
        if magic != b"GGUF":
            raise ModelError(f"{path}: expected a GGUF file (it starts with GGUF), found {magic!r}")
        try:
            return _read(stream)
        except (struct.error, EOFError) as error:
            raise ModelError(
                f"{path}: the file ends inside its header, after {path.stat().st_size:,} bytes. "
                f"It was cut short: fetch it again"
            ) from error


def check_whole(name: str, header: GgufHeader, found: int) -> None:
    """Raise ModelError when a file of `found` bytes is shorter than its tensors need."""
    expected = header.expected_size
    if found < expected:
        raise ModelError(
            f"{name}: expected at least {expected:,} bytes for its {len(header.tensors)} tensors, "
            f"found {found:,} ({expected - found:,} missing). It was cut short: fetch it again"
        )


def _read(stream: BinaryIO) -> GgufHeader:
    version, tensors, pairs = _take(stream, "<IQQ")
    if version not in (2, 3):
        raise ModelError(f"{stream.name}: expected GGUF version 2 or 3, found {version}")
    metadata = dict(_pair(stream) for _ in range(pairs))
    entries = tuple(_tensor(stream) for _ in range(tensors))
    alignment = metadata.get("general.alignment", 32)
    assert isinstance(alignment, int)
    return GgufHeader(metadata, entries, -(-stream.tell() // alignment) * alignment)


def _pair(stream: BinaryIO) -> tuple[str, object]:
    key = _string(stream).decode()
    (kind,) = _take(stream, "<I")
    return key, _value(stream, kind)


def _value(stream: BinaryIO, kind: int) -> object:
    if kind == _STRING:
        return _string(stream).decode(errors="replace")
    if kind == _ARRAY:
        return _skip_array(stream)
    return _take(stream, _SCALARS[kind])[0]


def _skip_array(stream: BinaryIO) -> int:
    kind, count = _take(stream, "<IQ")
    if kind in _SCALARS:
        stream.seek(struct.calcsize(_SCALARS[kind]) * count, 1)
    else:
        for _ in range(count):
            _string(stream) if kind == _STRING else _skip_array(stream)
    return int(count)


def _tensor(stream: BinaryIO) -> TensorEntry:
    name = _string(stream).decode()
    (dimensions,) = _take(stream, "<I")
    shape = _take(stream, f"<{dimensions}Q")
    kind, offset = _take(stream, "<IQ")
    return TensorEntry(name, prod(shape), kind, offset)


def _string(stream: BinaryIO) -> bytes:
    (length,) = _take(stream, "<Q")
    if length > _LONGEST:
        raise EOFError  # not a length: the bytes before it are missing or foreign
    data = stream.read(length)
    if len(data) != length:
        raise EOFError
    return data


def _take(stream: BinaryIO, layout: str) -> tuple[int, ...]:
    return struct.unpack(layout, stream.read(struct.calcsize(layout)))
