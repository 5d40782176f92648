"""Guarantee 17 of README.md: a change reruns what depends on it and nothing else.

Which setting belongs to which key is in tests/pipelines/test_keys.py; this is the whole line.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stillhouse.storage.layout import RunFolder
from stillhouse.storage.manifest import Manifest
from tests.contracts.tiny_run import STAGES, Finished, keys_of, stillhouse, tables_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
Run = Callable[..., Finished]


@pytest.fixture
def copy(clean_run: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(clean_run.root, tmp_path / "tiny")
    return RunFolder(tmp_path / "tiny")


@pytest.fixture
def run(copy: RunFolder, cache_root: Path) -> Run:
    def run(*overrides: str, command: str = "run") -> Finished:
        done = stillhouse(cache_root, command, "tiny", f"runs_root={copy.root.parent}", *overrides)
        assert done.code == 0, done.err
        return done

    return run


def test_a_learning_rate_reruns_the_student_and_what_follows(
    clean_run: RunFolder, copy: RunFolder, run: Run
) -> None:
    done = run("distill.learning_rate=0.02")
    place = STAGES.index("distill")
    for stage in STAGES[:place]:
        assert keys_of(copy)[stage] == keys_of(clean_run)[stage]
        assert f"= {stage}" in done.err
    for stage in STAGES[place:]:
        assert keys_of(copy)[stage] != keys_of(clean_run)[stage]
        assert f"✓ {stage}" in done.err
        assert len(Manifest(copy).stages_history(stage)) == 2
    assert tables_of(copy, "distill").keys() == tables_of(clean_run, "distill").keys()
    assert tables_of(copy, "distill") != tables_of(clean_run, "distill")


def test_a_batch_size_of_scoring_reruns_nothing(copy: RunFolder, run: Run) -> None:
    before = copy.manifest.read_bytes()
    done = run("score.batch_size=3")
    assert "✓" not in done.err
    assert all(f"= {stage}" in done.err for stage in STAGES)
    assert copy.manifest.read_bytes() == before


def test_plan_says_what_would_run_and_why(copy: RunFolder, run: Run) -> None:
    before = copy.manifest.read_bytes()
    lines = run("distill.learning_rate=0.02", command="plan").out.splitlines()
    rows = {stage: next(line for line in lines if f" {stage} " in line) for stage in STAGES}
    for stage in STAGES:
        cached = STAGES.index(stage) < STAGES.index("distill")
        assert (" cached " in rows[stage]) == cached
        assert ("finished:" if cached else "changed: ") in rows[stage]
    assert "changed: learning_rate 0.01 → 0.02" in rows["distill"]
    assert "changed: its input: distill" in rows["evaluate"]
    assert copy.manifest.read_bytes() == before
