"""Manifest and journal: what is read back, from files that were cut anywhere."""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.errors import AccountingError, IntegrityError
from stillhouse.storage.journal import JSON
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.manifest import (
    Counts,
    FileEntry,
    Manifest,
    ShardEntry,
    StageEntry,
    stage_files,
)


def shard(name: str, key: str = "k", stage: str = "score", rows: int = 3) -> ShardEntry:
    file = FileEntry("scores", f"stages/{stage}/{key}/scores/part-{name}.parquet", rows, 99, "ab")
    return ShardEntry(stage, key, name, (file,), Counts(rows, rows - 1, 1, 0), 40, 0.5)


def stage_entry(key: str = "k") -> StageEntry:
    file = FileEntry("artifact", f"stages/specialize/{key}/adapter.safetensors", 0, 7, "cd")
    facts: dict[str, JSON] = {"rank": 16, "note": "naïve", "targets": ["q", "v"]}
    return StageEntry("specialize", key, (file,), Counts(2, 2), 10, 1.5, facts)


def test_entries_come_back_as_they_were(folder: RunFolder) -> None:
    manifest = Manifest(folder)
    manifest.append(shard("00000"))
    manifest.append(stage_entry())
    manifest.append(shard("00001"))
    for reader in (manifest, Manifest(folder)):
        assert reader.shards("score", "k") == {"00000": shard("00000"), "00001": shard("00001")}
        assert reader.stage("specialize", "k") == stage_entry()
        assert reader.shards("score", "other") == {}
        assert reader.stage("specialize", "other") is None


def test_a_later_line_of_the_same_shard_wins(folder: RunFolder) -> None:
    manifest = Manifest(folder)
    manifest.append(shard("0", rows=3))
    manifest.append(shard("0", rows=5))
    assert manifest.shards("score", "k") == {"0": shard("0", rows=5)}


def test_history_has_every_key_in_order(folder: RunFolder) -> None:
    manifest = Manifest(folder)
    for key in ("a", "b", "a"):
        manifest.append(stage_entry(key))
        manifest.stage("specialize", key)  # looks in between read no line twice
    assert [entry.key for entry in manifest.stages_history("specialize")] == ["a", "b", "a"]


def test_files_are_listed_by_stage_and_shard(folder: RunFolder) -> None:
    manifest = Manifest(folder)
    manifest.append(shard("1"))
    manifest.append(shard("0"))
    manifest.append(shard("0", key="old"))
    manifest.append(stage_entry())
    files = stage_files(manifest, {"score": "k", "specialize": "k", "curate": "k"})
    assert [file.path[-9:] for file in files["score"]] == ["0.parquet", "1.parquet"]
    assert [file.table for file in files["specialize"]] == ["artifact"]
    assert files["curate"] == []


def test_a_bad_line_with_others_after_it_is_refused(folder: RunFolder) -> None:
    manifest = Manifest(folder)
    for name in "012":
        manifest.append(shard(name))
    lines = folder.manifest.read_bytes().splitlines(keepends=True)
    folder.manifest.write_bytes(lines[0] + b'{"kind": "shard", oops\n' + lines[2])
    with pytest.raises(IntegrityError, match=r"manifest\.jsonl, line 2: expected one JSON object"):
        Manifest(folder).shards("score", "k")


def test_a_line_that_lacks_a_field_is_refused(folder: RunFolder) -> None:
    manifest = Manifest(folder)
    manifest.append(shard("0"))
    with folder.manifest.open("ab") as file:
        file.write(b'{"kind":"shard","stage":"score","key":"k"}\n')
    with pytest.raises(IntegrityError, match=r"line 2: expected a shard or stage entry.*'files'"):
        manifest.shards("score", "k")


@settings(max_examples=60)
@given(st.integers(1, 5), st.data())
def test_a_file_cut_at_any_byte_is_a_prefix_and_can_be_continued(
    count: int, data: st.DataObject
) -> None:
    entries = [shard(str(number)) for number in range(count)]
    with TemporaryDirectory() as root:
        folder = RunFolder(Path(root))
        manifest = Manifest(folder)
        for entry in entries:
            manifest.append(entry)
        whole = folder.manifest.read_bytes()
        cut = data.draw(st.integers(0, len(whole)))
        tail = data.draw(st.sampled_from([b"", b"\0\0\0", b'{"kind":\n']))
        folder.manifest.write_bytes(whole[:cut] + tail)
        is_line_end = cut == 0 or whole[cut - 1 : cut] == b"\n"
        expected = entries[: whole[:cut].count(b"\n")]
        reader = Manifest(folder)
        assert list(reader.shards("score", "k").values()) == expected
        reader.append(shard("next"))
        assert list(reader.shards("score", "k").values()) == [*expected, shard("next")]
        assert list(Manifest(folder).shards("score", "k").values()) == [*expected, shard("next")]
        assert is_line_end or folder.manifest.read_bytes().count(b"\n") == len(expected) + 1


def test_a_reader_sees_what_another_process_commits(folder: RunFolder) -> None:
    reader, writer = Manifest(folder), Manifest(folder)
    for name in "012":
        writer.append(shard(name))
        assert name in reader.shards("score", "k")


counts = st.builds(Counts, *[st.integers(0, 10**9)] * 4)


@given(counts, counts)
def test_counts_add_up_field_by_field(a: Counts, b: Counts) -> None:
    total = a + b
    assert total == Counts(
        a.rows_in + b.rows_in, a.kept + b.kept, a.rejected + b.rejected, a.failed + b.failed
    )


@given(*[st.integers(0, 1000)] * 3, st.integers(-5, 5))
def test_accounting_holds_exactly_when_nothing_is_lost(
    kept: int, rejected: int, failed: int, lost: int
) -> None:
    counted = Counts(kept + rejected + failed + lost, kept, rejected, failed)
    if lost == 0:
        counted.check("score")
    else:
        with pytest.raises(AccountingError, match=f"stage score: {counted.rows_in} rows came in"):
            counted.check("score")


def test_planning_loads_neither_pyarrow_nor_duckdb_nor_mlflow() -> None:
    code = (
        "import sys, stillhouse.storage.manifest, stillhouse.storage.integrity\n"
        "import stillhouse.storage.lock, stillhouse.storage.events\n"
        "import stillhouse.storage.tracking.tracker\n"
        "print(sorted({'pyarrow', 'duckdb', 'mlflow', 'torch', 'requests'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
