"""What `stillhouse serve` starts for a run or a model: what was evaluated, unless it is told."""

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from stillhouse.configs.stages import CompressConfig
from stillhouse.errors import ConfigError
from stillhouse.pipelines.serving import (
    ServedModel,
    ServeOptions,
    ask_server,
    read_key,
    read_or_make_key,
    served_run,
)
from stillhouse.storage.layout import RunFolder


@pytest.fixture
def model(tmp_path: Path) -> ServedModel:
    return ServedModel(tmp_path, "student")


def export(model: ServedModel, **cache: Any) -> None:
    config = CompressConfig(**cache).model_dump()
    (model.folder / "stillhouse.json").write_text(json.dumps({"cache": config, "dtype": "float32"}))


def test_a_model_without_a_manifest_is_served_in_16_bits(model: ServedModel) -> None:
    found = ask_server(model, ServeOptions())
    assert (found.cache.format, found.cache.sinks, found.dtype) == ("bf16", 0, "bfloat16")
    assert found.key is None
    asked = ask_server(model, ServeOptions(cache="k4v4", dtype="float16"))
    assert (asked.cache.format, asked.cache.sinks, asked.dtype) == ("k4v4", 0, "float16")


def test_a_student_is_served_as_it_was_evaluated(model: ServedModel) -> None:
    export(model, key_bits=3, sinks=2)
    found = ask_server(model, ServeOptions())
    assert (found.cache.format, found.cache.sinks, found.dtype) == ("k3v4", 2, "float32")
    (model.folder / "cache").mkdir()
    found = ask_server(model, ServeOptions())
    assert (found.cache.format, found.cache.folder) == ("plan", model.folder / "cache")
    assert ask_server(model, ServeOptions(cache="bf16", dtype="bfloat16")).cache.format == "bf16"


@pytest.mark.parametrize("cache", [{"key_bits": 8}, {"recent": 4}, {"seed": 1}])
def test_a_cache_that_no_server_has_is_said(model: ServedModel, cache: dict[str, Any]) -> None:
    export(model, **cache)
    with pytest.raises(ConfigError, match="expected a cache that servers have"):
        ask_server(model, ServeOptions())
    assert ask_server(model, ServeOptions(cache="bf16")).cache.format == "bf16"


def test_a_plan_that_is_not_there_is_said(model: ServedModel) -> None:
    with pytest.raises(ConfigError, match="expected a cache plan in"):
        ask_server(model, ServeOptions(cache="plan"))


def test_a_manifest_without_a_cache_is_said(model: ServedModel) -> None:
    (model.folder / "stillhouse.json").write_text("{}")
    with pytest.raises(ConfigError, match="expected the settings of a cache"):
        ask_server(model, ServeOptions())


@pytest.mark.parametrize("report", [None, "", "{}", '{"deployment": null}', "[]"])
def test_a_run_without_a_student_is_said(tmp_path: Path, report: str | None) -> None:
    folder = RunFolder(tmp_path)
    if report is not None:
        folder.report.write_text(report)
    with pytest.raises(ConfigError, match="expected a run with a deployed student"):
        served_run(folder)


def test_a_refused_student_is_served_by_its_folder_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    deployment = {"model": "stages/deploy/model", "name": "mine", "refused": None}
    folder.report.write_text(json.dumps({"deployment": deployment}))
    assert served_run(folder) == ServedModel(tmp_path / "stages/deploy/model", "mine")
    folder.report.write_text(json.dumps({"deployment": deployment | {"refused": "too bad"}}))
    with pytest.raises(ConfigError, match=r"refused: too bad; .* name its folder: .*deploy/model"):
        served_run(folder)


def test_a_key_is_made_once_and_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "8000.key"
    key = read_or_make_key(path)
    assert len(key) > 40
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_or_make_key(path) == read_key(path) == key
    assert read_or_make_key(tmp_path / "other") != key


@pytest.mark.parametrize("text", ["", " \n", "two words", "\xff"])
def test_what_is_no_key_is_said(tmp_path: Path, text: str) -> None:
    path = tmp_path / "key"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"--api-key-file .*: expected"):
        read_or_make_key(path)


def test_a_key_that_cannot_be_written_or_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="expected a place for a new key"):
        read_or_make_key(tmp_path / "file" / "key")
    with pytest.raises(ConfigError, match="expected a readable key"):
        read_key(tmp_path / "nothing")
