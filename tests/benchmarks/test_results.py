"""The committed results say what the README and the guide promise of the fitted cache."""

import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse.workers.cache_quality.formats import DEFAULT_FORMATS

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
MODELS = ("smollm2-135m", "gemma-3-270m")
Rows = dict[str, dict[str, Any]]


def table(model: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"cache-quality-{model}.json").read_text())
    return found


@pytest.fixture(params=MODELS)
def rows(request: pytest.FixtureRequest) -> Rows:
    return {row["format"]: row for row in table(request.param)["rows"]}


@pytest.mark.parametrize("model", MODELS)
def test_formats_were_measured_on_8192_tokens_or_say_why_not(model: str) -> None:
    found = table(model)
    assert found["tokens"] >= 8192
    names = [row["format"] for row in found["rows"]]
    assert set(names) >= {"bf16", "fp8", "fitted:4", "fitted:3", "vllm:4bit_nc", "vllm:3bit_nc:all"}
    if model == "smollm2-135m":
        assert names == list(DEFAULT_FORMATS)
    assert all((row["kl_mean"] is None) == (row["note"] is not None) for row in found["rows"])


@pytest.mark.parametrize(("bits", "preset", "share"), [(4, "4bit_nc", 3), (3, "3bit_nc", 4)])
def test_a_fitted_cache_loses_a_third_and_a_quarter_of_what_the_presets_lose(
    rows: Rows, bits: int, preset: str, share: int
) -> None:
    """In perplexity, at equal or fewer bytes, against both kinds of the preset; and in KL."""
    fitted = rows[f"fitted:{bits}"]
    for peer in (rows[f"vllm:{preset}"], rows[f"vllm:{preset}:all"]):
        assert fitted["bytes_per_token"] <= peer["bytes_per_token"]
        assert share * fitted["perplexity_change"] <= peer["perplexity_change"]
        assert 3 * fitted["kl_mean"] <= peer["kl_mean"]


def test_at_long_context_the_resident_memory_falls_as_the_bytes_do() -> None:
    found = json.loads((RESULTS / "cache-cpu.json").read_text())
    last = {row["format"]: row for row in found["rows"] if row["context"] == 4096}
    for form in ("k4v4", "fitted3", "k4v4-packed", "fitted4-packed", "fitted3-packed"):
        assert (
            last[form]["peak_bytes"] < last["float16"]["peak_bytes"] < last["float32"]["peak_bytes"]
        )
