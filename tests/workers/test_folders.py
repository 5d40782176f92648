"""A full disk while a folder is filled, however the writer says so."""

import errno
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from stillhouse.errors import StorageFullError
from stillhouse.workers.folders import atomic_folder


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (OSError(errno.ENOSPC, "full"), "no space left on the device"),
        (OSError(errno.EDQUOT, "full"), "the disk quota is used up"),
        (
            SafetensorError('I/O error: Os { code: 28, message: "No space left on device" }'),
            "no space left on the device",
        ),
    ],
)
def test_a_full_disk_is_explained_as_for_tables(
    tmp_path: Path, error: Exception, found: str
) -> None:
    target = tmp_path / "adapter"
    expected = rf"{found} while writing {target}: [\d,]+ bytes are free\."
    with pytest.raises(StorageFullError, match=expected), atomic_folder(target):
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), ValueError("other")])
def test_another_error_stays_what_it_is(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, atomic_folder(tmp_path / "adapter"):
        raise error
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


def test_every_file_may_be_read_by_those_whom_the_umask_lets(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "model") as folder:
        save_file({"a": torch.ones(2)}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    plain = tmp_path / "plain"
    plain.touch()
    modes = {path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert modes == {plain.stat().st_mode}
