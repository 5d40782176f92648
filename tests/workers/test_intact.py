"""What a server refuses of an exported folder that was changed."""

import json
import re
from pathlib import Path

import pytest

from stillhouse.errors import ModelError
from stillhouse.storage.integrity import sha256_of
from stillhouse.workers.intact import require_intact

FILES = {"model.safetensors": b"weights", "cache/cache_plan.json": b"{}"}


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    files = {name: sha256_of(tmp_path / name) for name in FILES}
    (tmp_path / "stillhouse.json").write_text(json.dumps({"files": files}))
    return tmp_path


def test_what_was_exported_is_served(exported: Path) -> None:
    require_intact(exported)
    (exported / "README.md").write_text("mine")
    require_intact(exported)


@pytest.mark.parametrize("name", FILES)
def test_another_models_file_is_refused_with_both_hashes(exported: Path, name: str) -> None:
    wanted = sha256_of(exported / name)
    (exported / name).write_bytes(b"of another model")
    found = sha256_of(exported / name)
    with pytest.raises(ModelError, match=f"expected sha256 {wanted}, .*found {found}"):
        require_intact(exported)
    (exported / name).unlink()
    with pytest.raises(ModelError, match=f"expected sha256 {wanted}, .*found no such file"):
        require_intact(exported)


@pytest.mark.parametrize("name", ["extra.safetensors", "chat_template.jinja", "cache/config.json"])
def test_a_file_that_an_engine_reads_and_nobody_exported_is_refused(
    exported: Path, name: str
) -> None:
    (exported / name).write_bytes(b"of another model")
    with pytest.raises(ModelError, match=f"no file that {re.escape('stillhouse.json')} does not"):
        require_intact(exported)


def test_a_plan_put_beside_a_model_that_has_none_is_refused(exported: Path) -> None:
    plan = exported / "cache" / "cache_plan.safetensors"
    plan.write_bytes(b"of another model")
    with pytest.raises(ModelError, match=f"found one of sha256 {sha256_of(plan)}"):
        require_intact(exported)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"files": 3}',
        '{"files": {"a": 1}}',
        '{"files": {"../a": "0"}}',
        '{"files": {"/a": "0"}}',
    ],
)
def test_a_manifest_that_cannot_be_read_is_said(exported: Path, text: str) -> None:
    (exported / "stillhouse.json").write_text(text)
    with pytest.raises(ModelError, match=r"stillhouse\.json: expected"):
        require_intact(exported)


def test_a_folder_without_a_manifest_is_served(exported: Path) -> None:
    (exported / "stillhouse.json").unlink()
    (exported / "model.safetensors").write_bytes(b"other weights")
    require_intact(exported)
