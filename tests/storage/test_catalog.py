"""The run's rows as SQL tables: complete for us, read-only and closed for a user."""

import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillhouse.errors import ConfigError, IntegrityError, StillhouseError, StorageFullError
from stillhouse.storage.catalog import Catalog
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.manifest import Counts, Manifest, ShardEntry
from stillhouse.storage.records import (
    TABLES,
    CacheMeasureRecord,
    CompletionRecord,
    CorpusRecord,
    EvaluationRecord,
    ExampleRecord,
    PromptRecord,
    QuestionRecord,
    Record,
    ScoreRecord,
    SelectionRecord,
)
from stillhouse.storage.shards import write_shard

KEYS = {"ingest": "i1", "score": "s1", "expand": "x1", "curate": "c1", "distill": "d1"}
KEYS |= {"evaluate": "e1"}


def prompt(name: str, parent: str | None = None) -> PromptRecord:
    about, number = (name, "text", "rendered", "icd"), int(parent is not None)
    return PromptRecord(*about, "pool", "train", number, parent, f"l-{name}", "kept", None)


def score(name: str, gap: float, status: Literal["kept", "failed"] = "kept") -> ScoreRecord:
    ids, ends, on, off = [1, 2], [2, 3], [-0.5, -1.0], [-2.0, -3.0]
    return ScoreRecord(f"c-{name}", name, 0, 4, ids, ends, on, off, gap, -0.75, status, None)


def completion(name: str) -> CompletionRecord:
    return CompletionRecord(f"c-{name}", name, "A00", "stop", 0)


@pytest.fixture
def manifest(folder: RunFolder) -> Manifest:
    manifest = Manifest(folder)

    def put(stage: str, key: str, shard: str, **tables: list[Record]) -> None:
        files = write_shard(folder, stage, key, shard, tables)
        manifest.append(ShardEntry(stage, key, shard, files, Counts(), 0, 0.0))

    put("ingest", "i1", "0", prompts=[prompt("p1"), prompt("p2")],
        questions=[QuestionRecord("q1", "t", "r", "A01", "l", "kept", None)])  # fmt: skip
    put("score", "s1", "0", completions=[completion("p1")], scores=[score("p1", 2.0)])
    put("score", "s1", "1", completions=[completion("p2")], scores=[score("p2", 0.5)])
    put("score", "old", "0", scores=[score("p1", 99.0)])
    put("expand", "x1", "0", prompts=[prompt("p3", "p1")], completions=[completion("p3")],
        scores=[score("p3", 1.0)],
        selections=[SelectionRecord("c-p3", "p3", 1, 1.0, -0.7, "kept", None)])  # fmt: skip
    made = ("x3", "p3", "c-p3", "rendered", "A00", [3], [1.0])
    put("curate", "c1", "0", corpus=[CorpusRecord(*made, "train", [], "kept", None)])
    put("distill", "d1", "0", examples=[ExampleRecord("distill", "x3", 12, "kept", None)])
    asked = EvaluationRecord("student", "q1", "A01", "A01", True, -0.1, 3, "kept", None)
    put("evaluate", "e1", "0", evaluations=[asked])
    return manifest


@pytest.fixture
def catalog(folder: RunFolder, manifest: Manifest) -> Iterator[Catalog]:
    with Catalog(folder, manifest, KEYS, threads=1) as catalog:
        yield catalog


def test_a_table_unites_all_shards_and_stages_of_the_current_keys(catalog: Catalog) -> None:
    rows = catalog.rows("SELECT prompt_id, gap, _stage FROM scores ORDER BY prompt_id")
    assert rows == [("p1", 2.0, "score"), ("p2", 0.5, "score"), ("p3", 1.0, "expand")]


def test_tables_without_files_are_empty_and_have_their_columns(
    folder: RunFolder, catalog: Catalog
) -> None:
    with Catalog(folder, Manifest(folder), {}, threads=1) as empty:
        for table in TABLES:
            assert empty.rows(f"SELECT count(*) FROM {table}") == [(0,)]
        described = "SELECT column_name, column_type FROM (DESCRIBE scores)"
        assert empty.rows(described) == catalog.rows(described)


def test_records_come_back_as_they_were_written(catalog: Catalog) -> None:
    rows = catalog.records("SELECT * FROM scores WHERE gap > ?", ScoreRecord, 1, [1.5])
    assert list(rows) == [score("p1", 2.0)]


def test_a_query_that_lacks_a_column_is_refused(catalog: Catalog) -> None:
    with pytest.raises(ValueError, match=r"ScoreRecord needs the columns \['completion_id'"):
        catalog.records("SELECT gap FROM scores", ScoreRecord)


def test_two_queries_may_be_read_at_once(catalog: Catalog) -> None:
    outer = catalog.records("SELECT * FROM prompts ORDER BY prompt_id", PromptRecord, 1)
    seen = [
        (row.prompt_id, catalog.rows("SELECT gap FROM scores WHERE prompt_id = ?", [row.prompt_id]))
        for row in outer
    ]
    assert seen == [("p1", [(2.0,)]), ("p2", [(0.5,)]), ("p3", [(1.0,)])]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT count(*) AS n FROM scores",
        "WITH s AS (SELECT * FROM scores) SELECT count(*) AS n FROM s;",
        "FROM scores SELECT count(*) AS n -- a comment",
        "DESCRIBE scores",
        "SHOW TABLES",
        "SUMMARIZE SELECT gap FROM scores",
        "EXPLAIN SELECT * FROM scores",
        "EXPLAIN ANALYZE SELECT * FROM scores",
        "VALUES (1)",
        """SELECT 'COPY ''x''' AS "copy", $$COPY$$ /* copy */ FROM scores""",
    ],
)
def test_what_reads_is_allowed(catalog: Catalog, sql: str) -> None:
    names, rows = catalog.query(sql)
    assert names
    assert list(rows)


def forbidden(here: Path) -> list[str]:
    """Return SQL that writes, leaves the run or changes settings; `here` is a file of the run."""
    copy = f"COPY (SELECT 1 AS x) TO '{str(here).replace(chr(39), chr(39) * 2)}'"
    copy += " (FORMAT parquet, USE_TMP_FILE false)"
    quoted = copy.replace("'", "''")
    return [
        "COPY scores TO 'out.csv'",
        copy,
        f"WITH x AS ({copy}) SELECT 1",
        f"WITH é AS (SELECT 'éé'), x AS ({copy}) SELECT 1",
        f"EXPLAIN ANALYZE {copy}",
        f"EXPLAIN ANALYZE WITH x AS ({copy}) SELECT 'é'",
        f"SELECT * FROM query('WITH x AS ({quoted}) SELECT 1')",
        "INSTALL httpfs",
        "LOAD httpfs",
        "ATTACH 'other.db'",
        "EXPORT DATABASE 'out'",
        "IMPORT DATABASE 'out'",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM read_blob('/etc/passwd')",
        "SELECT * FROM '/etc/passwd'",
        "SELECT * FROM glob('/etc/*')",
        "SELECT * FROM sniff_csv('/etc/passwd')",
        "SELECT * FROM read_parquet('https://example.org/x.parquet')",
        "PRAGMA version",
        "PRAGMA threads=1",
        "SET threads = 1",
        "RESET lock_configuration",
        "CALL pragma_version()",
        "SELECT 1; SELECT 2",
        "",
        ";",
        "SELECT 1; DROP VIEW scores",
        "CREATE TABLE t (a INT)",
        "CREATE TEMP TABLE t (a INT)",
        "DROP VIEW scores",
        "INSERT INTO scores VALUES (1)",
        "UPDATE scores SET gap = 1",
        "DELETE FROM scores",
        "WITH x AS (DELETE FROM scores RETURNING *) SELECT * FROM x",
        "EXPLAIN ANALYZE DROP VIEW scores",
        "EXPLAIN ANALYZE CREATE TABLE t (a INT)",
        "BEGIN",
        "COMMIT",
        "PREPARE v AS SELECT 1",
        "CHECKPOINT",
        "USE memory",
        "SELECT * FROM stray",  # a Python variable
        "SELECT nothing FROM scores",
        "SELEC 1",
    ]


def test_what_does_anything_else_is_refused(
    folder: RunFolder, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stray = pa.table({"secret": [1]})
    assert stray.num_rows == 1
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    before = catalog.rows("SELECT count(*), sum(gap) FROM scores")
    let_through = []
    for sql in forbidden(folder.shard_path("score", "s1", "scores", "0")):
        try:
            list(catalog.query(sql)[1])
        except ConfigError as error:
            said = str(error)
        else:
            said = ""
        if "Allowed is one statement that reads" not in said:
            let_through.append((sql, said))
    assert let_through == []
    assert catalog.rows("SELECT count(*), sum(gap) FROM scores") == before
    now = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert now == files


def test_an_error_in_the_last_row_is_a_refusal_too(catalog: Catalog) -> None:
    late = "SELECT CASE i WHEN 899999 THEN error('late') ELSE i END FROM range(900000) r(i)"
    _, rows = catalog.query(late)
    assert next(rows) == (0,)
    with pytest.raises(ConfigError, match="late"):
        list(rows)


def test_a_file_that_vanished_is_an_integrity_error(
    folder: RunFolder, manifest: Manifest, catalog: Catalog
) -> None:
    folder.shard_path("score", "s1", "scores", "0").unlink()
    with pytest.raises(IntegrityError, match="a file of the run cannot be read"):
        catalog.rows("SELECT sum(gap) FROM scores")
    with pytest.raises(IntegrityError, match="a file of the run cannot be read"):
        Catalog(folder, manifest, KEYS)


def rewrite(path: Path, **columns: pa.Array | None) -> None:
    """Write a file of the run as another version would have: other columns, or without some."""
    table = pq.read_table(path)
    for name, values in columns.items():
        at = table.column_names.index(name)
        table = table.remove_column(at)
        if values is not None:
            table = table.add_column(at, name, values)
    pq.write_table(table, path)


def reading(catalog: Catalog) -> list[Callable[[], object]]:
    sql = "SELECT sum(confidence) FROM scores"
    return [
        lambda: catalog.rows(sql),
        lambda: list(catalog.stream(sql)),
        lambda: list(catalog.query(sql)[1]),
        lambda: list(catalog.records("SELECT * FROM scores", ScoreRecord)),
        lambda: catalog.trace("p2"),
    ]


@pytest.mark.parametrize(
    ("values", "found"),
    [(None, "none of that name"), (pa.array(["high"]), "of type string")],
)
def test_a_file_of_another_version_is_named_with_its_column(
    folder: RunFolder, manifest: Manifest, values: pa.Array | None, found: str
) -> None:
    expected = (
        rf"expected the column confidence \(double\) of scores, found {found}.* Run the recipe"
    )
    rewrite(folder.shard_path("score", "s1", "scores", "1"), confidence=values)
    with Catalog(folder, manifest, KEYS, threads=1) as catalog:
        assert catalog.rows("SELECT count(*) FROM prompts") == [(3,)]
        for read in reading(catalog):
            with pytest.raises(IntegrityError, match=rf"scores/part-1\.parquet: {expected}"):
                read()
    rewrite(folder.shard_path("score", "s1", "scores", "0"), confidence=values)
    with pytest.raises(IntegrityError, match=rf"scores/part-0\.parquet: {expected}"):
        Catalog(folder, manifest, KEYS)


def test_a_column_that_is_no_more_is_let_by(folder: RunFolder, manifest: Manifest) -> None:
    path = folder.shard_path("score", "s1", "scores", "0")
    pq.write_table(pq.read_table(path).append_column("margin", pa.array([1.0])), path)
    with Catalog(folder, manifest, KEYS, threads=1) as catalog:
        assert catalog.rows("SELECT sum(gap) FROM scores WHERE _stage = 'score'") == [(2.5,)]


def test_a_file_that_is_damaged_is_an_integrity_error(
    folder: RunFolder, manifest: Manifest
) -> None:
    folder.shard_path("score", "s1", "scores", "1").write_bytes(b"junk")
    with Catalog(folder, manifest, KEYS, threads=1) as catalog:
        for read in reading(catalog):
            with pytest.raises(IntegrityError, match=r"cannot be read: .*part-1\.parquet"):
                read()
    folder.shard_path("score", "s1", "scores", "0").write_bytes(b"junk")
    with pytest.raises(IntegrityError, match=r"cannot be read: .*part-0\.parquet"):
        Catalog(folder, manifest, KEYS)


def test_a_query_of_ours_that_finds_no_room_says_so(folder: RunFolder, manifest: Manifest) -> None:
    hungry = "SELECT list(i) FROM range(30000000) r(i)"
    with Catalog(folder, manifest, KEYS, memory_limit="20MB", threads=1) as catalog:
        with pytest.raises(StorageFullError, match=r"may hold 20MB in memory .* bytes are free"):
            catalog.rows(hungry)
        with pytest.raises(ConfigError, match="this SQL was refused: Out of Memory"):
            list(catalog.query(hungry)[1])


def test_a_query_of_ours_that_fails_is_our_error(catalog: Catalog) -> None:
    late = "SELECT CASE i WHEN 899999 THEN error('late') ELSE i END FROM range(900000) r(i)"
    for sql, said in (("SELECT nothing FROM scores", "Binder Error"), (late, "late")):
        for read in (catalog.rows, lambda sql: list(catalog.stream(sql))):
            with pytest.raises(StillhouseError, match=f"query of ours .*{said}") as raised:
                read(sql)
            assert type(raised.value) is StillhouseError


def test_a_folder_may_be_named_like_a_pattern(tmp_path: Path) -> None:
    for name in ("runs [1]", "runs 1", "a*b", "axb", "what?"):
        folder = RunFolder(tmp_path / name)
        files = write_shard(folder, "score", "s1", "0", {"completions": [completion(name)]})
        manifest = Manifest(folder)
        manifest.append(ShardEntry("score", "s1", "0", files, Counts(), 0, 0.0))
        with Catalog(folder, manifest, KEYS, threads=1) as catalog:
            assert catalog.rows("SELECT prompt_id FROM completions") == [(name,)]


def test_what_does_not_fit_in_memory_is_spilled_and_removed(
    folder: RunFolder, manifest: Manifest
) -> None:
    with Catalog(folder, manifest, KEYS, memory_limit="50MB", threads=1) as catalog:
        sql = "SELECT i, repeat('x', 100) || i AS s FROM range(600000) r(i) ORDER BY s DESC"
        rows = catalog.stream(sql)
        assert next(rows)[0] == 99_999
        assert any(path.is_file() for path in folder.root.glob(".spill-*/*"))
        assert isinstance(rows, Generator)
        rows.close()
    assert not list(folder.root.glob(".spill-*"))


def test_an_interrupt_amid_a_query_is_one(catalog: Catalog) -> None:
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        catalog.rows("SELECT count(*) FROM range(10000000) a, range(10000000) b WHERE a != b")
    timer.join()


def test_a_trace_tells_a_prompts_way_from_its_parent_on(catalog: Catalog) -> None:
    way = [
        ("prompts", "ingest"), ("prompts", "expand"), ("completions", "expand"),
        ("scores", "expand"), ("selections", "expand"), ("corpus", "curate"),
        ("examples", "distill"),
    ]  # fmt: skip
    for identity in ("p3", "c-p3", "x3"):
        steps = catalog.trace(identity)
        assert [(table, row["_stage"]) for table, row in steps] == way
    assert steps[0][1]["prompt_id"] == "p1"
    assert steps[1][1]["parent_id"] == "p1"


def test_a_trace_of_a_question_ends_in_its_evaluation(catalog: Catalog) -> None:
    assert [table for table, _ in catalog.trace("q1")] == ["questions", "evaluations"]


def test_an_unknown_id_is_said(catalog: Catalog) -> None:
    with pytest.raises(ConfigError, match="no table of this run knows the id 'p9'"):
        catalog.trace("p9")


def test_a_trace_of_a_private_pair_is_its_example(folder: RunFolder, manifest: Manifest) -> None:
    example = ExampleRecord("specialize", "private_1", 9, "kept", None)
    files = write_shard(folder, "distill", "d1", "1", {"examples": [example]})
    manifest.append(ShardEntry("distill", "d1", "1", files, Counts(), 0, 0.0))
    with Catalog(folder, manifest, KEYS, threads=1) as catalog:
        assert [table for table, _ in catalog.trace("private_1")] == ["examples"]


@pytest.mark.parametrize("identity", ["x3", "p3", "q1"])
def test_a_trace_ends_in_what_the_cache_was_measured_on(
    folder: RunFolder, manifest: Manifest, identity: str
) -> None:
    rows = [
        CacheMeasureRecord(text_id, 9, 0.1, 0.2, -3.0, -3.1, 10.0, 32.0, 4096, "kept", None)
        for text_id in ("x3", "q1")
    ]
    files = write_shard(folder, "evaluate", "e1", "1", {"cache_measures": rows})
    manifest.append(ShardEntry("evaluate", "e1", "1", files, Counts(), 0, 0.0))
    with Catalog(folder, manifest, KEYS, threads=1) as catalog:
        [row] = [row for table, row in catalog.trace(identity) if table == "cache_measures"]
    assert row["text_id"] == ("q1" if identity == "q1" else "x3")


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELECT * FROM nope", r"this SQL failed: .*nope.*The tables are raw, prompts, "),
        ("SELEC 1", "this SQL failed: .*SELEC"),
        ("SELECT * FROM read_text('/etc/passwd')", "this SQL was refused: "),
    ],
)
def test_a_slip_is_told_from_what_is_not_allowed(catalog: Catalog, sql: str, message: str) -> None:
    with pytest.raises(ConfigError, match="(?s)" + message):
        list(catalog.query(sql)[1])
