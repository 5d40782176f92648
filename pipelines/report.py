"""A run's result for programs, from its manifest alone (no table is read)."""

from collections.abc import Mapping
from typing import Any

from stillhouse.configs.recipe import RecipeConfig
from stillhouse.storage.manifest import Manifest, StageEntry

CACHE_FIGURES = (
    "bytes_per_token_16bit",
    "bytes_per_token",
    "table_bytes",
    "kl_mean",
    "perplexity_change",
)


def build_report(
    recipe: RecipeConfig, manifest: Manifest, keys: Mapping[str, str]
) -> dict[str, Any]:
    """Return the report; stages that have not run are missing from it.

    Keys: `accuracy.<arm>` (exact match), `standard_error.<arm>`, `perplexity.<arm>`, `items`,
    `failed.<arm>`, `recovery`, `cache.*`, `selection.<origin>`, `expansion`, `deployment` (with the
    gate's verdict), `stages.<stage>.*`.
    """
    found = {name: manifest.stage(name, key) for name, key in keys.items()}
    entries = {name: entry for name, entry in found.items() if entry is not None}
    report: dict[str, Any] = {
        "name": recipe.name,
        "pipeline": recipe.pipeline,
        "keys": dict(keys),
        "stages": {name: _stage(entry) for name, entry in entries.items()},
    }
    if "select" in entries:
        report["selection"] = entries["select"].facts["origins"]
    if "expand" in entries:
        report["expansion"] = entries["expand"].facts["rounds"]
    if "evaluate" in entries:
        report |= _evaluation(entries["evaluate"].facts, entries.get("compress"))
    if "compress" in entries:
        cache: Mapping[str, Any] = _mapping(entries["compress"].facts["cache"])
        report["cache"] = {name: cache[name] for name in CACHE_FIGURES}
    if "deploy" in entries:
        report["deployment"] = dict(entries["deploy"].facts)
    return report


def _evaluation(facts: Mapping[str, Any], compress: StageEntry | None) -> dict[str, Any]:
    arms = dict(facts["arms"])
    if compress is not None:
        arms["student_compressed"] = compress.facts["arm"]
    return {
        "accuracy": {arm: figures["exact_match"] for arm, figures in arms.items()},
        "standard_error": {arm: figures["standard_error"] for arm, figures in arms.items()},
        "perplexity": {arm: figures["perplexity"] for arm, figures in arms.items()},
        "items": max(figures["items"] for figures in arms.values()),
        "recovery": facts["recovery"],
        "failed": {arm: figures["failed"] for arm, figures in arms.items()},
    }


def _stage(entry: StageEntry) -> dict[str, Any]:
    counts = entry.counts
    return {
        "seconds": round(entry.seconds, 3),
        "rows_in": counts.rows_in,
        "kept": counts.kept,
        "rejected": counts.rejected,
        "failed": counts.failed,
        "tokens": entry.tokens,
        "tokens_per_second": round(entry.tokens / entry.seconds, 1) if entry.tokens else None,
    }


def _mapping(value: object) -> Mapping[str, Any]:
    assert isinstance(value, dict)
    return value
