"""What is written as JSON can be read as JSON, by any program."""

import json
from pathlib import Path

import pytest

from stillhouse.errors import StillhouseError
from stillhouse.storage.events import EventLog
from stillhouse.storage.journal import JSON
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.manifest import Counts, Manifest, StageEntry
from stillhouse.storage.strict_json import json_text

NAN, INFINITY = float("nan"), float("inf")


def test_finite_values_are_written_as_they_are() -> None:
    value = {"a": [1, 0.1, 5e-324, 1.7976931348623157e308], "b": {"c": None, "d": "NaN"}}
    for indent in (None, 2):
        assert json.loads(json_text(value, Path("x"), indent)) == value
    assert json_text({"a": [1, None]}, Path("x")) == '{"a":[1,null]}'


def test_each_number_that_is_not_finite_is_named() -> None:
    value = {"cache": {"kl_mean": NAN, "tokens": 3}, "losses": [0.5, -INFINITY]}
    with pytest.raises(StillhouseError) as raised:
        json_text(value, Path("runs/a/report.json"))
    found = str(raised.value)
    assert "runs/a/report.json: expected finite numbers" in found
    assert "found cache.kl_mean = nan, losses.1 = -inf;" in found


def test_a_journal_takes_no_number_that_is_not_finite(folder: RunFolder) -> None:
    manifest, log = Manifest(folder), EventLog(folder)
    facts: dict[str, JSON] = {"perplexity": INFINITY}
    with pytest.raises(StillhouseError, match=r"manifest\.jsonl: .* facts\.perplexity = inf;"):
        manifest.append(StageEntry("evaluate", "k", (), Counts(), 0, 0.0, facts))
    with pytest.raises(StillhouseError, match=r"events\.jsonl: .* data\.value = nan;"):
        log.emit("metric", "compress", name="kl_mean", value=NAN, step=0)
    assert manifest.stages_history("evaluate") == []
    assert log.emit("metric", "compress", name="kl_mean", value=0.1, step=0) == 1
