"""The report, from a manifest made by hand."""

from typing import Any

from stillhouse.pipelines.report import build_report
from stillhouse.storage.manifest import Counts, Manifest, StageEntry
from tests.pipelines.conftest import Line

ARM = {"items": 40, "failed": 3, "exact_match": 0.25, "standard_error": 0.068, "perplexity": 3.0}
CACHE = {
    "kl_mean": 0.01,
    "kl_max": 0.2,
    "perplexity_change": 0.002,
    "bytes_per_token": 100.0,
    "bytes_per_token_16bit": 400.0,
    "table_bytes": 2_000_000,
    "tokens": 700,
}


def entry(stage: str, key: str, tokens: int = 0, **facts: Any) -> StageEntry:
    return StageEntry(stage, key, (), Counts(9, 6, 2, 1), tokens, 2.0, facts)


def test_nothing_has_run(line: Line) -> None:
    report = build_report(line.recipe, Manifest(line.runner().folder), {"ingest": "k"})
    assert report == {
        "name": "line",
        "pipeline": "transfer",
        "keys": {"ingest": "k"},
        "stages": {},
    }


def test_every_figure(line: Line) -> None:
    manifest, keys = Manifest(line.runner().folder), {}
    facts_by_stage: dict[str, dict[str, Any]] = {
        "select": {"origins": {"pool": {"rows": 4, "rejected": 1, "reject_rate": 0.25}}},
        "expand": {"rounds": [{"round": 1}]},
        "evaluate": {
            "arms": {"base": ARM | {"exact_match": 0.0}, "student": ARM},
            "recovery": 0.5,
        },
        "compress": {"arm": ARM | {"exact_match": 0.2}, "cache": CACHE},
        "deploy": {"name": "student", "refused": None, "promoted": True},
    }
    for stage, facts in facts_by_stage.items():
        keys[stage] = f"key of {stage}"
        manifest.append(entry(stage, keys[stage], 300 if stage == "evaluate" else 0, **facts))
    report = build_report(line.recipe, manifest, keys)
    assert report["accuracy"] == {"base": 0.0, "student": 0.25, "student_compressed": 0.2}
    assert report["perplexity"]["student_compressed"] == 3.0
    assert report["standard_error"]["student"] == 0.068
    assert (report["items"], report["recovery"]) == (40, 0.5)
    assert report["failed"]["student"] == 3
    assert report["cache"] == {
        "bytes_per_token_16bit": 400.0,
        "table_bytes": 2_000_000,
        "bytes_per_token": 100.0,
        "kl_mean": 0.01,
        "perplexity_change": 0.002,
    }
    assert report["selection"]["pool"]["reject_rate"] == 0.25
    assert report["expansion"] == [{"round": 1}]
    assert report["deployment"]["promoted"] is True
    assert report["stages"]["evaluate"] == {
        "seconds": 2.0,
        "rows_in": 9,
        "kept": 6,
        "rejected": 2,
        "failed": 1,
        "tokens": 300,
        "tokens_per_second": 150.0,
    }
    assert report["stages"]["select"]["tokens_per_second"] is None


def test_a_stage_of_other_settings_is_not_reported(line: Line) -> None:
    manifest = Manifest(line.runner().folder)
    manifest.append(entry("ingest", "old"))
    report = build_report(line.recipe, manifest, {"ingest": "new"})
    assert report["stages"] == {}
