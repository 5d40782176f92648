"""The header of a GGUF file, whole and damaged: it is read, or refused with a ModelError."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.errors import ModelError
from stillhouse.workers.models.gguf_header import check_whole, read_header
from tests.workers.small_gguf import TENSORS, write_small_gguf


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def whole(folder) -> bytes:
    return write_small_gguf(folder / "whole.gguf").read_bytes()


def checked(folder, content: bytes):
    """The header, after all that is asked of one before a conversion."""
    path = folder / "damaged.gguf"
    path.write_bytes(content)
    header = read_header(path)
    check_whole(path.name, header, len(content))
    assert header.parameters >= 0
    return header


def test_a_whole_header_is_read(folder, whole):
    header = checked(folder, whole)
    assert header.metadata["general.alignment"] == 64
    assert header.metadata["tokenizer.ggml.tokens"] == 3  # an array as its length
    assert [(one.name, one.elements, one.kind) for one in header.tensors] == TENSORS
    assert header.data_start % 64 == 0
    assert header.expected_size <= len(whole)


def test_every_byte_changed_and_every_length_is_read_or_refused(folder, whole):
    end = read_header(folder / "whole.gguf").data_start
    for position in range(end):
        for value in (0xFF, whole[position] ^ 1):
            accepts_or_refuses(folder, whole[:position] + bytes([value]) + whole[position + 1 :])
        accepts_or_refuses(folder, whole[:position])


@given(data=st.data())
def test_any_damage_is_read_or_refused(folder, whole, data):
    content = bytearray(whole)
    places = st.integers(0, len(content) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=8)):
        content[place : place + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=9))
    accepts_or_refuses(folder, bytes(content))


def accepts_or_refuses(folder, content: bytes) -> None:
    said = refusal(folder, content)
    assert said is None or "expected" in said or "ends inside its header" in said


def refusal(folder, content: bytes) -> str | None:
    try:
        checked(folder, content)
    except ModelError as error:
        return str(error)
    return None


def file(*pairs: bytes, version: int = 3, tensors: tuple[bytes, ...] = ()) -> bytes:
    head = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(pairs))
    return b"".join((head, *pairs, *tensors))


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def array(kind: int, count: int) -> bytes:
    return struct.pack("<IQ", kind, count)


ALIGNMENT = text(b"general.alignment")
NESTED = text(b"k") + struct.pack("<I", 9) + array(9, 1) * 2000 + array(0, 0)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (file(version=1), "GGUF version 2 or 3, found 1"),
        (file(text(b"k") + struct.pack("<I", 13)), "a value of type 0 to 12, found type 13"),
        (file(text(b"k") + struct.pack("<I", 9) + array(77, 1)), "0 to 12, found type 77"),
        (file(NESTED), "arrays at most 8 deep"),
        (file(text(b"\xff\xfe") + struct.pack("<IB", 0, 1)), r"a name in UTF-8, found b'\\xff"),
        (file(ALIGNMENT + struct.pack("<II", 4, 0)), "general.alignment, found 0"),
        (file(ALIGNMENT + struct.pack("<Ii", 5, -8)), "general.alignment, found -8"),
        (file(ALIGNMENT + struct.pack("<I", 8) + text(b"x")), "general.alignment, found 'x'"),
        (file(tensors=(text(b"w") + struct.pack("<I", 1 << 31),)), "at most 4 dimensions of 'w'"),
        (file(tensors=(text(b"w") + struct.pack("<IQIQ", 1, 8, 99, 0),)), "found type 99 of 'w'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",
)
def test_what_is_damaged_is_named_with_the_cure(folder, content, found):
    with pytest.raises(ModelError, match=rf"damaged.gguf: expected .*{found}.*[Ff]etch the file"):
        checked(folder, content)


@pytest.mark.parametrize("count", [9, 1 << 40, (1 << 64) - 1])
def test_an_array_longer_than_the_file_was_cut_short(folder, count):
    with pytest.raises(ModelError, match="ends inside its header"):
        checked(folder, file(text(b"k") + struct.pack("<I", 9) + array(10, count) + bytes(64)))
