"""The header of a GGUF file: its metadata, its tensors, and how long the file must be.

Read by hand (specification: ggml docs/gguf.md, version 3): the gguf package's reader maps the
tensors as it goes and answers a file that was cut short with an unrelated numpy error.
"""

import os
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
_DIMENSIONS = 4  # ggml's most
_DEEPEST = 8  # arrays inside arrays; none are in use


class ArrayLength(int):
    """The length of an array, which is all that is read of it; no value of its own."""


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

    path: Path
    metadata: dict[str, object]
    tensors: tuple[TensorEntry, ...]
    data_start: int

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.elements for tensor in self.tensors)

    @cached_property
    def expected_size(self) -> int:
        """Bytes the file must have for its last tensor to be whole.

        Raises ModelError for a tensor of a type that the gguf package does not know.
        """
        from gguf.constants import GGML_QUANT_SIZES

        sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        end = 0
        for tensor in self.tensors:
            if tensor.kind not in sizes:
                raise ModelError(
                    f"{self.path}: expected a tensor type that the gguf package knows, found type "
                    f"{tensor.kind} of {tensor.name!r}. Fetch the file again, or one quantised "
                    f"otherwise (Q8_0, Q4_K_M)"
                )
            block, width = sizes[tensor.kind]
            end = max(end, tensor.offset + tensor.elements // block * width)
        return self.data_start + end


def read_header(path: Path) -> GgufHeader:
    """Read the header; raises ModelError when the file is no GGUF, or its header is not whole."""
    with path.open("rb") as stream:
        magic = stream.read(4)
        if magic != b"GGUF":
            raise ModelError(
                f"{path}: expected a GGUF file (it starts with GGUF), found {magic!r}. Check the "
                f"path, or fetch the file again"
            )
        try:
            return _read(stream, path)
        except (struct.error, EOFError) as error:
            raise ModelError(
                f"{path}: the file ends inside its header, after {path.stat().st_size:,} bytes. "
                f"It was cut short: fetch it again"
            ) from error
        except ValueError as error:
            raise ModelError(
                f"{path}: expected {error}. Its header is damaged, or of a version that is not "
                f"read here: fetch the file again, or convert the model anew"
            ) from error


def check_whole(name: str, header: GgufHeader, found: int) -> None:
    """Raise ModelError when a file of `found` bytes is shorter than its tensors need."""
    expected = header.expected_size
    if found < expected:
        raise ModelError(
            f"{name}: expected at least {expected:,} bytes for its {len(header.tensors)} tensors, "
            f"found {found:,} ({expected - found:,} missing). It was cut short: fetch it again"
        )


def _read(stream: BinaryIO, path: Path) -> GgufHeader:
    """EOFError or struct.error where the file ends; ValueError: what was expected and found."""
    version, tensors, pairs = _take(stream, "<IQQ")
    if version not in (2, 3):
        raise ValueError(f"GGUF version 2 or 3, found {version}")
    metadata = dict(_pair(stream) for _ in range(pairs))
    entries = tuple(_tensor(stream) for _ in range(tensors))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"a positive whole number as general.alignment, found {alignment!r}")
    return GgufHeader(path, metadata, entries, -(-stream.tell() // alignment) * alignment)


def _pair(stream: BinaryIO) -> tuple[str, object]:
    key = _name(stream)
    (kind,) = _take(stream, "<I")
    return key, _value(stream, kind)


def _value(stream: BinaryIO, kind: int) -> object:
    if kind == _STRING:
        return _string(stream).decode(errors="replace")
    if kind == _ARRAY:
        return ArrayLength(_skip_array(stream))
    return _take(stream, _layout(kind))[0]


def _skip_array(stream: BinaryIO, depth: int = 1) -> int:
    kind, count = _take(stream, "<IQ")
    if depth > _DEEPEST:
        raise ValueError(f"arrays at most {_DEEPEST} deep, found another inside them")
    if kind == _STRING:
        for _ in range(count):
            _string(stream)
    elif kind == _ARRAY:
        for _ in range(count):
            _skip_array(stream, depth + 1)
    else:
        _skip(stream, struct.calcsize(_layout(kind)) * count)
    return count


def _layout(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a value of type 0 to 12, found type {kind}")
    return _SCALARS[kind]


def _tensor(stream: BinaryIO) -> TensorEntry:
    name = _name(stream)
    (dimensions,) = _take(stream, "<I")
    if dimensions > _DIMENSIONS:
        raise ValueError(f"at most {_DIMENSIONS} dimensions of {name!r}, found {dimensions}")
    shape = _take(stream, f"<{dimensions}Q")
    kind, offset = _take(stream, "<IQ")
    return TensorEntry(name, prod(shape), kind, offset)


def _name(stream: BinaryIO) -> str:
    raw = _string(stream)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"a name in UTF-8, found {raw[:40]!r}") from error


def _string(stream: BinaryIO) -> bytes:
    (length,) = _take(stream, "<Q")
    if length > _LONGEST:
        raise EOFError  # not a length: the bytes before it are missing or foreign
    data = stream.read(length)
    if len(data) != length:
        raise EOFError
    return data


def _skip(stream: BinaryIO, length: int) -> None:
    if length > os.fstat(stream.fileno()).st_size - stream.tell():
        raise EOFError  # seeking past the end would succeed
    stream.seek(length, os.SEEK_CUR)


def _take(stream: BinaryIO, layout: str) -> tuple[int, ...]:
    return struct.unpack(layout, stream.read(struct.calcsize(layout)))
