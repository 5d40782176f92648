"""Guarantee 16 of README.md: the same recipe writes the same bytes, wherever it runs."""

import shutil
from pathlib import Path

import pytest

from stillhouse.storage.layout import RunFolder
from tests.contracts.tiny_run import facts_of, keys_of, stillhouse, tables_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def elsewhere(clean_run: RunFolder, tmp_path_factory, cache_root: Path) -> RunFolder:
    """The line up to the student's training: another folder, hash seed, time zone and locale."""
    home = tmp_path_factory.mktemp("else where")
    done = stillhouse(
        cache_root,
        *("run", "tiny", f"runs_root={home}", "--until", "distill"),
        cwd=home,
        PYTHONHASHSEED="4242",
        TZ="Pacific/Chatham",
        LC_ALL="C.UTF-8",
    )
    assert done.code == 0, done.err
    return RunFolder(home / "tiny")


@pytest.mark.parametrize(
    "stage", ["ingest", "specialize", "score", "select", "expand", "curate", "distill"]
)
def test_another_place_writes_the_same_bytes(
    clean_run: RunFolder, elsewhere: RunFolder, stage: str
) -> None:
    assert keys_of(elsewhere)[stage] == keys_of(clean_run)[stage]
    assert tables_of(elsewhere, stage) == tables_of(clean_run, stage)
    assert facts_of(elsewhere, stage) == facts_of(clean_run, stage)


def test_a_shard_done_again_lands_on_the_same_name_with_the_same_bytes(
    clean_run: RunFolder, tmp_path: Path, cache_root: Path
) -> None:
    """Its file is there and its line is not, as after a kill between the two."""
    copy = RunFolder(tmp_path / "tiny")
    shutil.copytree(clean_run.root, copy.root)
    lines = copy.manifest.read_text().splitlines(keepends=True)
    gone = ('"stage":"curate"', '"stage":"select"')
    copy.manifest.write_text("".join(line for line in lines if not any(g in line for g in gone)))
    done = stillhouse(cache_root, "run", "tiny", f"runs_root={tmp_path}")
    assert done.code == 0, done.err
    for stage in ("select", "curate"):
        assert tables_of(copy, stage) == tables_of(clean_run, stage)
        assert facts_of(copy, stage) == facts_of(clean_run, stage)


def test_no_file_holds_a_place_or_a_time(clean_run: RunFolder) -> None:
    """What names this machine's folders could not be the same elsewhere."""
    root = str(clean_run.root.parent).encode()
    for path in (clean_run.root / "stages").rglob("*"):
        assert not path.is_file() or root not in path.read_bytes(), path
