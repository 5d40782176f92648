"""The benchmark of the cache on a CPU, on a toy model; no figure of time is judged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORMATS = ("float16", "float32", "k4v4", "fitted3", "k4v4-packed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def benchmark(cache_root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "cache_cpu.py"), "--model", "toy:llama"]
    return subprocess.run(
        [*command, "--threads", "1", *options],
        env=os.environ | {"STILLHOUSE_CACHE": str(cache_root)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_row_a_format_with_its_peers(cache_root: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text", tmp_path / "out.json"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 400)
    files = ("--text", str(text), "--json", str(out))
    done = benchmark(cache_root, "--contexts", "64", "--formats", *FORMATS, *files)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert {"date", "machine", "versions", "model"} <= set(found)
    assert [(row["format"], row["context"]) for row in found["rows"]] == [(f, 64) for f in FORMATS]
    half, whole, packed, fitted, attended = found["rows"]
    assert 2 * half["cache_bytes"] == whole["cache_bytes"] > half["cache_bytes"] > 0
    assert packed["cache_bytes"] < 0.5 * half["cache_bytes"]
    assert half["encode_seconds"] == 0 < packed["encode_seconds"] <= packed["cache_seconds"]
    assert fitted["cache_bytes"] < packed["cache_bytes"]
    assert fitted["table_bytes"] > packed["table_bytes"]
    assert attended["decode_seconds"] == 0 < packed["decode_seconds"]
    assert attended["cache_bytes"] == packed["cache_bytes"]
    assert packed["encode_share"] == packed["encode_seconds"] / half["step_seconds"]
    assert (tmp_path / "out.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json", "nowhere/out.json"], "expected a folder that exists, found nowhere"),
        (
            ["--json", "out.json", "--contexts", "9999", "--formats", "k4v4"],
            "expected a text and a context of",
        ),
    ],
)
def test_what_cannot_be_measured_is_one_message(
    cache_root: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    text = tmp_path / "text"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 60)
    done = benchmark(cache_root, "--text", str(text), *options)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
