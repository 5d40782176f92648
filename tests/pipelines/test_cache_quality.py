"""The texts, the file and the picture of a measurement of cache formats."""

import json
from typing import cast
from xml.etree import ElementTree

import pytest

from stillhouse.errors import ConfigError
from stillhouse.pipelines.cache_picture import draw_quality
from stillhouse.pipelines.cache_quality import (
    QualitySource,
    ask_quality,
    corpus_source,
    text_source,
    write_quality,
)
from stillhouse.storage.catalog import Catalog
from stillhouse.storage.manifest import Manifest
from stillhouse.storage.records import CorpusRecord, Split
from stillhouse.workers.cache_quality.formats import DEFAULT_FORMATS, parse_format
from stillhouse.workers.cache_quality.report import QualityFigures, QualityReport, QualityRow
from tests.pipelines.conftest import Line

FIGURES = QualityFigures(1000.0, 64, 10.1, 0.01, 0.002, 0.1, 0.99, 0.5)


def report() -> QualityReport:
    rows = (
        QualityRow(parse_format("mse:4"), (FIGURES,)),
        QualityRow(parse_format("mse:3"), (FIGURES, FIGURES)),
        QualityRow(parse_format("vllm:4bit_nc:all"), (FIGURES,)),
        QualityRow(parse_format("hqq:4"), (), "not installed"),
    )
    return QualityReport(rows, 8, 8192, 4096, 10.0, {512: 0.875})


def test_a_text_is_halved_at_a_line(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one\ntwo three\nfour\n")
    source = text_source(path)
    assert (source.calibration, source.heldout) == (("one\ntwo three\n",), ("four\n",))
    assert (source.name, len(source.sha256)) == ("text.txt", 64)


@pytest.mark.parametrize("data", [b"", b"one line", b"\n\n\n", b"\xff\xfe\n\n"])
def test_a_text_that_has_no_two_halves(tmp_path, data):
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="--text: expected"):
        text_source(path)
    with pytest.raises(ConfigError, match="--text: expected a text file"):
        text_source(tmp_path / "none")


def source_of(line: Line, **texts: list[str]) -> QualitySource:
    """Of a run whose corpus has these prompts by split, each with the response "!"."""
    rows = [
        CorpusRecord(
            f"{split}{number}", "", "", text, "!", [], [], cast(Split, split), [], "kept", None
        )
        for split, prompts in texts.items()
        for number, text in enumerate(prompts)
    ]
    rejected = CorpusRecord("x", "", "", "not this", "!", [], [], "train", [], "rejected", "why")
    line.commit("curate", "only", corpus=[*rows, rejected])
    runner = line.runner()
    with Catalog(runner.folder, Manifest(runner.folder), runner.keys()) as catalog:
        return corpus_source("run", catalog)


def test_a_corpus_gives_both_splits(line):
    source = source_of(line, train=["a", "b"], heldout=["c"])
    assert (source.calibration, source.heldout) == (("a!", "b!"), ("c!",))
    assert (source.name, len(source.sha256)) == ("run", 64)


def test_a_corpus_without_a_heldout_part(line):
    with pytest.raises(ConfigError, match="1 to train on and 0 held out"):
        source_of(line, train=["a"])


SOURCE = QualitySource("run", "0" * 64, ("c",), ("a",))


def test_no_formats_are_all_of_them():
    job = ask_quality(SOURCE, (), 2, 100, 200, 64)
    assert tuple(form.name for form in job.formats) == DEFAULT_FORMATS
    assert (job.seeds, job.tokens, job.calibration_tokens, job.window) == (2, 100, 200, 64)
    names = ask_quality(SOURCE, ("mse:4", "bf16", "mse:4"), 1, 2, 64, 16).formats
    assert [form.name for form in names] == ["mse:4", "bf16"]


def test_the_table_for_programs_and_the_picture(tmp_path):
    job = ask_quality(SOURCE, ("mse:4",), 2, 100, 100, 64)
    out = tmp_path / "out.json"
    picture = write_quality("toy:llama", SOURCE, job, report(), out)
    found = json.loads(out.read_text())
    assert (found["model"], found["tokens"], found["perplexity"]) == ("toy:llama", 8192, 10.0)
    assert found["text"] == {"name": "run", "sha256": SOURCE.sha256}
    assert found["needle_full"] == {"512": 0.875}
    assert [row["format"] for row in found["rows"]] == [
        "mse:4", "mse:3", "vllm:4bit_nc:all", "hqq:4",
    ]  # fmt: skip
    for name in ("calibrated", "bytes_per_token", "perplexity", "perplexity_change", "kl_mean",
                 "kl_p99", "top1_agreement", "needle"):  # fmt: skip
        assert found["rows"][0][name] == getattr(FIGURES, name, False)
    assert picture == tmp_path / "out.svg"
    ElementTree.fromstring(picture.read_text())
    with pytest.raises(ConfigError, match="--json: expected a file that can be written"):
        write_quality("toy:llama", SOURCE, job, report(), out / "out.json")


def test_a_picture_is_the_same_each_time_and_has_a_curve_a_family():
    first = draw_quality(report(), "title")
    assert first == draw_quality(report(), "title")
    for words in ("mse", "vllm, all layers", "title"):
        assert f"<!-- {words} -->" in first
    assert "hqq" not in first
