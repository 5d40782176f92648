"""Files that were changed behind the manifest's back are found, and unchanged ones not reread."""

import os
from pathlib import Path

import pytest

from stillhouse.errors import IntegrityError
from stillhouse.storage.integrity import file_entry, verify
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.manifest import FileEntry

HOUR_AGO = 3_600


@pytest.fixture
def path(folder: RunFolder) -> Path:
    path = folder.stage_dir("score", "k") / "scores" / "part-0.parquet"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"the committed bytes")
    return path


@pytest.fixture
def entry(folder: RunFolder, path: Path) -> FileEntry:
    return file_entry(folder, path, "scores", 1)


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an hour pass, so that no file is too fresh to be remembered."""
    import time

    later = time.time_ns() + HOUR_AGO * 10**9
    monkeypatch.setattr("time.time_ns", lambda: later)


def test_an_unchanged_file_is_read_once(folder, entry, monkeypatch) -> None:
    settle(monkeypatch)
    assert verify(folder, [entry]) == 1
    assert verify(folder, [entry]) == 0


def test_a_fresh_file_is_read_again(folder, entry) -> None:
    # an edit of the same size in the same clock tick would show in no time stamp
    assert verify(folder, [entry]) == 1
    assert verify(folder, [entry]) == 1


def test_an_edit_is_named_with_both_hashes(folder, entry, path, monkeypatch) -> None:
    settle(monkeypatch)
    verify(folder, [entry])
    times = path.stat()
    path.write_bytes(b"the committed BYTES")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # an edit that covers its tracks
    with pytest.raises(IntegrityError) as caught:
        verify(folder, [entry])
    message = str(caught.value)
    assert "stages/score/k/scores/part-0.parquet is not what was committed" in message
    assert f"expected sha256 {entry.sha256}, found sha256 " in message
    assert "Put the original file back" in message


def test_another_size_is_told_without_reading(folder, entry, path) -> None:
    path.write_bytes(b"more than the committed bytes")
    with pytest.raises(IntegrityError, match="expected 19 bytes, found 29 bytes"):
        verify(folder, [entry])


def test_a_missing_file_is_told(folder, entry, path) -> None:
    path.unlink()
    with pytest.raises(IntegrityError, match="expected 19 bytes, found no file"):
        verify(folder, [entry])


@pytest.mark.parametrize("memo", [b"", b"[]", b'{"a": 1}', b"\xff", b'{"a": [1, 2]}'])
def test_a_damaged_memo_only_costs_time(folder, entry, memo, monkeypatch) -> None:
    settle(monkeypatch)
    folder.verified.write_bytes(memo)
    assert verify(folder, [entry]) == 1
    assert verify(folder, [entry]) == 0
