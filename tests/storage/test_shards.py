"""Shards: what is written comes back, twice the same bytes, and nothing half-written stays."""

import dataclasses
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.errors import IntegrityError, StorageFullError
from stillhouse.storage.durable import sweep
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.records import TABLES, CompletionRecord, Record, ScoreRecord
from stillhouse.storage.shards import hash_artifacts, read_rows, write_shard

ROOT = Path(__file__).parents[2]


def completions(count: int) -> list[CompletionRecord]:
    return [
        CompletionRecord(f"c{n}", f"p{n}", f"réponse {n}\n", "stop", n % 3) for n in range(count)
    ]


def leftovers(folder: RunFolder) -> list[Path]:
    return list(folder.root.rglob("*.tmp"))


def test_a_shard_is_written_where_the_layout_says(folder: RunFolder) -> None:
    (entry,) = write_shard(folder, "score", "k1", "00007", {"completions": completions(3)})
    assert entry.path == "stages/score/k1/completions/part-00007.parquet"
    assert (entry.table, entry.rows) == ("completions", 3)
    assert entry.bytes == (folder.root / entry.path).stat().st_size
    assert list(read_rows(folder, entry, CompletionRecord)) == completions(3)
    assert leftovers(folder) == []


def test_tables_without_rows_are_written_too(folder: RunFolder) -> None:
    rows: dict[str, list[Record]] = {"scores": [], "completions": [*completions(1)]}
    files = write_shard(folder, "score", "k", "0", rows)
    assert [(file.table, file.rows) for file in files] == [("completions", 1), ("scores", 0)]
    assert list(read_rows(folder, files[1], ScoreRecord)) == []


def test_reading_holds_one_batch_at_a_time(folder: RunFolder) -> None:
    (entry,) = write_shard(folder, "score", "k", "0", {"completions": completions(100)})
    rows = read_rows(folder, entry, CompletionRecord, batch=7)
    assert next(rows) == completions(1)[0]
    assert len(list(rows)) == 99


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is list:
        item = get_args(hint)[0]
        narrow = st.floats(width=32, allow_nan=False)
        return st.lists(narrow if item is float else values_of(item), max_size=4)
    if hint is str:
        return st.text(max_size=8)
    if hint is int:
        return st.integers(-(2**63), 2**63 - 1)
    if hint is float:
        return st.floats(allow_nan=False)
    if hint is bool:
        return st.booleans()
    if get_origin(hint) is Union or get_args(hint):
        return st.one_of(*[st.none() if h is type(None) else values_of(h) for h in get_args(hint)])
    raise AssertionError(hint)


def rows_of(record_type: type[Record]) -> st.SearchStrategy[Record]:
    hints = get_type_hints(record_type)
    fields = [field.name for field in dataclasses.fields(record_type)]
    return st.builds(record_type, **{name: values_of(hints[name]) for name in fields})


@settings(max_examples=40)
@given(st.data())
def test_any_rows_of_any_table_come_back(data: st.DataObject) -> None:
    table = data.draw(st.sampled_from(sorted(TABLES)))
    rows = data.draw(st.lists(rows_of(TABLES[table]), max_size=4))
    with TemporaryDirectory() as root:
        folder = RunFolder(Path(root))
        (entry,) = write_shard(folder, "s", "k", "0", {table: rows})
        assert list(read_rows(folder, entry, TABLES[table])) == rows


WRITE = """
import sys
from pathlib import Path
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.records import CompletionRecord, ScoreRecord
from stillhouse.storage.shards import write_shard
n = range(9000)
files = write_shard(RunFolder(Path(sys.argv[1])), "score", "k", "0", {
    "completions": [CompletionRecord(f"c{i}", f"p{i}", "x" * (i % 50), "stop", 0) for i in n],
    "scores": [
        ScoreRecord(f"c{i}", f"p{i}", 0, 1, [i], [1], [-0.1], [-i / 7], i / 3, None, "kept", None)
        for i in n
    ],
})
print([(file.path, file.sha256) for file in files])
"""


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    outputs = []
    for name, seed in (("one", "1"), ("two", "2")):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", WRITE, str(tmp_path / name)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
    assert "sha256" not in outputs[0]
    assert len(outputs[0]) > 150


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_what_to_do_and_leaves_nothing(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(_: int) -> None:
        raise OSError(number, "full")

    (before,) = write_shard(folder, "score", "k", "0", {"completions": completions(3)})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageFullError, match=r"part-1.parquet: about [\d,]+ bytes .* free"):
            write_shard(folder, "score", "k", "1", {"completions": completions(3)})
        with pytest.raises(StorageFullError):
            write_shard(folder, "score", "k", "0", {"completions": completions(2)})
    assert leftovers(folder) == []
    assert not folder.shard_path("score", "k", "completions", "1").exists()
    assert list(read_rows(folder, before, CompletionRecord)) == completions(3)


FILL = """
import os, sys
from pathlib import Path
from stillhouse.errors import StorageFullError
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.manifest import Counts, Manifest, StageEntry
from stillhouse.storage.records import CompletionRecord
from stillhouse.storage.shards import write_shard
folder = RunFolder(Path(sys.argv[1]))
rows = [CompletionRecord(os.urandom(300).hex(), "p", "t", "stop", 0) for _ in range(2000)]
try:
    write_shard(folder, "score", "k", "0", {"completions": rows})
except StorageFullError as error:
    print("shard:", error)
manifest = Manifest(folder)
written = 0
try:
    while True:
        manifest.append(StageEntry("s", str(written), (), Counts(), 0, 0.0, {"pad": "x" * 9000}))
        written += 1
except StorageFullError as error:
    print("manifest:", error)
assert len(Manifest(folder).stages_history("s")) == written > 5
assert not list(folder.root.rglob("*.tmp"))
"""


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip(
            "no unshare (Linux alone has it) to mount a small disk: ours is not to be filled"
        )
    script = 'mount -t tmpfs -o size=256k none "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    command += [str(tmp_path), sys.executable, FILL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("this machine lets nobody mount")
    assert done.returncode == 0, done.stderr
    shard, manifest = done.stdout.splitlines()
    assert shard.startswith("shard: no space left on the device while writing")
    assert manifest.startswith("manifest: no space left on the device while writing")


def test_leftovers_of_a_dead_run_are_swept(folder: RunFolder) -> None:
    (entry,) = write_shard(folder, "score", "k", "0", {"completions": completions(3)})
    torn = (folder.root / entry.path).with_name(".part-1.parquet.deadbeef.tmp")
    torn.write_bytes(b"half")
    (folder.root / ".verified.json.deadbeef.tmp").write_bytes(b"half")
    host = os.uname().nodename
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True
    )
    mine = folder.spill(f"{host}@{os.getpid()}@0")
    gone = folder.spill(f"{host}@{int(dead.stdout)}@0")
    for spill in (mine, gone):
        spill.mkdir(parents=True)
    assert sweep(folder) == 2
    assert leftovers(folder) == []
    assert mine.exists()
    assert not gone.exists()
    assert list(read_rows(folder, entry, CompletionRecord)) == completions(3)


def test_what_is_no_longer_parquet_or_has_other_columns_is_named(folder: RunFolder) -> None:
    (entry,) = write_shard(folder, "score", "k", "0", {"completions": completions(3)})
    with pytest.raises(IntegrityError, match=r"expected the columns of scores .*found completion_"):
        list(read_rows(folder, entry, ScoreRecord))
    path = folder.root / entry.path
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(IntegrityError, match=r"part-0\.parquet: expected a Parquet file"):
        list(read_rows(folder, entry, CompletionRecord))
    path.unlink()
    with pytest.raises(IntegrityError, match=r"part-0\.parquet: expected a Parquet file"):
        list(read_rows(folder, entry, CompletionRecord))


def test_an_undeclared_table_is_refused(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match="no table 'notes' is declared"):
        write_shard(folder, "score", "k", "0", {"notes": []})


def test_artifacts_are_listed_with_their_hashes(folder: RunFolder) -> None:
    adapter = folder.stage_dir("specialize", "k") / "adapter"
    (adapter / "deep").mkdir(parents=True)
    (adapter / "b.json").write_bytes(b"")
    (adapter / "deep" / "a.bin").write_bytes(b"abc")
    entries = hash_artifacts(folder, adapter)
    assert entries[1].path == "stages/specialize/k/adapter/deep/a.bin"
    assert entries[1].sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert [(e.path[-6:], e.table, e.bytes) for e in entries] == [
        ("b.json", "artifact", 0),
        ("/a.bin", "artifact", 3),
    ]
