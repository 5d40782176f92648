"""Data references: every format streamed, every broken line set aside with its number."""

import subprocess
import sys
import types
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import exceptions

from stillhouse.errors import SourceError
from stillhouse.workers.sources import builtins
from stillhouse.workers.sources.files import read_jsonl
from stillhouse.workers.sources.reader import MalformedRow, SourceRow, fingerprint, read

COMMIT = "0123456789" * 4
BROKEN = "b" * 40
ICD = "builtin:icd10cm?split={}&categories=3&pool_per_category=2&lookalikes=4&elsewhere=4"


def write(path, content: bytes | str):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_json_lines_keep_order_numbers_and_plain_values(tmp_path):
    write(
        tmp_path / "a.jsonl",
        '\ufeff{"prompt": "naïve", "n": 3}\n\n{"prompt": "b", "gone": null, "list": [1, "é"]}\r\n',
    )
    assert list(read("jsonl:a.jsonl", tmp_path)) == [
        SourceRow({"prompt": "naïve", "n": "3"}, "a.jsonl:1"),
        SourceRow({"prompt": "b", "list": '[1, "é"]'}, "a.jsonl:3"),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "cut', "found invalid JSON"),
        (b"[1, 2]", "expected a JSON object, found an array"),
        (b"null", "expected a JSON object, found null"),
        (b"7", "expected a JSON object, found a number"),
        (b'{"prompt": "\xff"}', "found byte 0xff at position 12"),
        (b'{"prompt": "\\ud800"}', "lone surrogate"),
        (b"[" * 100_000, "found invalid JSON"),
        (b"\x00\x01", "found invalid JSON"),
        (b'{"prompt": ' + b"7" * 4_301 + b"}", "found a number too long to read"),
    ],
)
def test_a_broken_json_line_is_set_aside_with_its_number(tmp_path, line, reason):
    good = b'{"prompt": "good"}'
    write(tmp_path / "a.jsonl", b"\n".join([good, line, good]))
    first, broken, last = read("jsonl:a.jsonl", tmp_path)
    assert isinstance(first, SourceRow)
    assert isinstance(broken, MalformedRow)
    assert broken.locator == "a.jsonl:2"
    assert reason in broken.reason
    assert last == SourceRow({"prompt": "good"}, "a.jsonl:3")


def test_json_of_any_depth_is_read_or_set_aside(tmp_path):
    """A cell is nested one level less than its line: what could be parsed may not be written."""
    depths = range(900, 1010)
    write(tmp_path / "a.jsonl", "\n".join(f'{{"prompt": {"[" * n}{"]" * n}}}' for n in depths))
    rows = list(read("jsonl:a.jsonl", tmp_path))
    assert [row.locator for row in rows] == [f"a.jsonl:{n}" for n in range(1, len(depths) + 1)]


def test_csv_cells_may_hold_commas_quotes_and_line_breaks(tmp_path):
    write(tmp_path / "a.csv", '\ufeffprompt,response\n"a, ""b""\nc",x\n\nd,\n')
    assert list(read("csv:a.csv", tmp_path)) == [
        SourceRow({"prompt": 'a, "b"\nc', "response": "x"}, "a.csv:3"),
        SourceRow({"prompt": "d", "response": ""}, "a.csv:5"),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"one", "expected 2 cells, found 1"),
        (b"one,two,three", "expected 2 cells, found 3"),
        (b"caf\xe9,x", "expected UTF-8, found byte 0xe9"),
        (b'"a"b,x', "expected CSV"),
    ],
)
def test_a_broken_csv_line_is_set_aside_with_its_number(tmp_path, line, reason):
    write(tmp_path / "a.csv", b"\n".join([b"prompt,response", b"a,b", line, b"c,d"]))
    first, broken, last = read("csv:a.csv", tmp_path)
    assert isinstance(broken, MalformedRow)
    assert broken.locator == "a.csv:3"
    assert reason in broken.reason
    assert (first.locator, last.locator) == ("a.csv:2", "a.csv:4")


@pytest.mark.parametrize(
    ("content", "found"), [("", "found none"), ("a,b,a\n1,2,3\n", "found 'a' twice")]
)
def test_a_csv_without_a_header_of_distinct_columns_is_refused(tmp_path, content, found):
    write(tmp_path / "a.csv", content)
    with pytest.raises(SourceError, match=found):
        list(read("csv:a.csv", tmp_path))


def test_parquet_rows_are_read_in_batches(tmp_path):
    table = pa.table({"prompt": [f"p{i}" for i in range(3000)], "n": [None, *range(2999)]})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = list(read("parquet:a.parquet", tmp_path))
    assert len(rows) == 3000
    assert rows[0] == SourceRow({"prompt": "p0"}, "a.parquet:1")
    assert rows[2999] == SourceRow({"prompt": "p2999", "n": "2998"}, "a.parquet:3000")


def test_a_parquet_file_cut_short_is_refused(tmp_path):
    pq.write_table(pa.table({"prompt": ["p"] * 99}), tmp_path / "a.parquet")
    write(tmp_path / "a.parquet", (tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(SourceError, match=r"a\.parquet: expected a whole Parquet file"):
        list(read("parquet:a.parquet", tmp_path))


def test_reading_holds_one_row_at_a_time():
    """From a pipe that never ends."""
    process = subprocess.Popen(["yes", '{"prompt": "x"}'], stdout=subprocess.PIPE)
    try:
        rows = list(islice(read_jsonl(Path(f"/dev/fd/{process.stdout.fileno()}"), "pipe"), 5000))
    finally:
        process.kill()
        process.communicate()
    assert rows[-1] == SourceRow({"prompt": "x"}, "pipe:5000")


def test_a_missing_column_names_the_nearest(tmp_path):
    write(tmp_path / "a.jsonl", '{"promt": "x", "answer": "y"}\n' * 40)
    with pytest.raises(SourceError, match=r"a\.jsonl:1.*'prompt', found promt, answer; did you"):
        list(read("jsonl:a.jsonl", tmp_path, columns=["prompt"]))


def test_a_row_without_a_value_is_set_aside_and_the_others_stay(tmp_path):
    write(tmp_path / "a.jsonl", '{"other": 1}\nnot json\n{"prompt": "x"}\n{"prompt": null}\n')
    rows = list(read("jsonl:a.jsonl", tmp_path, columns=["prompt"]))
    assert [type(row) for row in rows] == [MalformedRow, MalformedRow, SourceRow, MalformedRow]
    assert rows[3] == MalformedRow("a.jsonl:4", "expected a value in 'prompt', found none")


@pytest.mark.parametrize(
    ("ref", "hint"),
    [
        ("data.jsonl", "did you mean jsonl:data.jsonl"),
        ("jsnl:data.jsonl", "did you mean jsonl:data.jsonl?"),
        ("jsonlines:data.txt", "did you mean jsonl:"),
        ("parqet:data", "did you mean parquet:"),
        ("jsonl:", "nothing follows 'jsonl:'"),
        ("jsonl:dta.jsonl", "did you mean data.jsonl"),
        ("jsonl:no/such/folder.jsonl", "expected a file at"),
        ("package:no-such-dist/a.csv", "pip install --no-deps no-such-dist"),
        ("builtin:icd9?split=pool", "expected one of icd10cm"),
        ("hf:org/data?split=train", "expected a 40-digit commit"),
        ("hf:org/data@main?split=train", "found main. Write hf:org/data@<commit>"),
        (f"hf:org/data@{COMMIT}?split=a&split=b", "'split' is given twice"),
        (f"hf:org/data@{COMMIT}?split", "expected name=value"),
    ],
)
def test_a_wrong_reference_is_told_the_right_one(tmp_path, ref, hint):
    write(tmp_path / "data.jsonl", "{}\n")
    with pytest.raises(SourceError) as caught:
        list(read(ref, tmp_path))
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("query", "hint"),
    [
        ("split=pool&categories=3", "expected pool_per_category=<number>"),
        (ICD.format("pool").partition("?")[2] + "&categoris=3", "did you mean 'categories'"),
        (ICD.format("pool").partition("?")[2] + "&seed=x", "expected a whole number"),
        (ICD.format("pol").partition("?")[2], "unknown split 'pol'"),
    ],
)
def test_a_wrong_builtin_option_is_told_the_right_one(tmp_path, query, hint):
    with pytest.raises(SourceError) as caught:
        list(read(f"builtin:icd10cm?{query}", tmp_path))
    assert hint in str(caught.value)


def test_the_builtin_gives_its_rows(tmp_path):
    rows = list(read(ICD.format("private"), tmp_path, columns=["prompt", "response"]))
    assert len(rows) == 3 * 16
    assert rows[0].locator == "builtin:icd10cm/private:1"
    assert {"prompt", "response"} == set(rows[0].values)


def test_a_file_of_a_package_is_read_by_its_suffix(tmp_path, monkeypatch):
    site = tmp_path / "site"
    info = site / "some_data-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-data\nVersion: 1.0\n")
    write(site / "some_data.csv", "prompt\nx\n")
    write(site / "some_data.txt", "x")
    monkeypatch.syspath_prepend(str(site))
    (row,) = read("package:some-data/some_data.csv", tmp_path)
    assert row == SourceRow({"prompt": "x"}, "package:some-data/some_data.csv:2")
    with pytest.raises(SourceError, match=r"expected a \.jsonl, \.csv or \.parquet file"):
        list(read("package:some-data/some_data.txt", tmp_path))


@pytest.fixture
def hub(monkeypatch):
    """The package datasets, answering from a list."""
    asked = []

    def load_dataset(*names, **options):
        asked.append((names, options))
        if options["split"] != "test":
            raise ValueError("Bad split: train. Available splits: ['test']")
        return streamed(options)

    def streamed(options):
        yield {"text": "one", "label": 3}
        if options["revision"] == BROKEN:
            raise exceptions.DatasetGenerationError("the file ends too soon")

    module = types.SimpleNamespace(load_dataset=load_dataset, exceptions=exceptions)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_a_hub_data_set_is_streamed_at_its_revision(hub, tmp_path):
    (row,) = read(f"hf:org/data@{COMMIT}?split=test&config=en", tmp_path)
    assert row == SourceRow({"text": "one", "label": "3"}, "hf:org/data/test:1")
    assert hub == [(("org/data", "en"), {"split": "test", "revision": COMMIT, "streaming": True})]
    with pytest.raises(SourceError, match=r"could not read split 'train': .*\['test'\]"):
        list(read(f"hf:org/data@{COMMIT}", tmp_path))
    with pytest.raises(SourceError, match=r"could not read split 'test': .*ends too soon"):
        list(read(f"hf:org/data@{BROKEN}?split=test", tmp_path))
    with pytest.raises(SourceError, match="expected split and config, found 'spilt'"):
        list(read(f"hf:org/data@{COMMIT}?spilt=test", tmp_path))


def test_without_the_package_datasets_its_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SourceError, match=r"pip install 'stillhouse\[hub\]'"):
        list(read(f"hf:org/data@{COMMIT}", tmp_path))


def test_a_fingerprint_follows_content_format_and_parameters(tmp_path, monkeypatch):
    def prints(*references):
        return [fingerprint(ref, tmp_path / "cache", tmp_path) for ref in references]

    write(tmp_path / "a.csv", "prompt\nx\n")
    write(tmp_path / "b.csv", "prompt\nx\n")
    write(tmp_path / "c.csv", "prompt\ny\n")
    a, b, c = prints("csv:a.csv", "csv:b.csv", "csv:c.csv")
    assert a == b != c
    assert prints("jsonl:a.csv") != [a]
    one, other_split = prints(ICD.format("pool"), ICD.format("private"))
    assert one != other_split
    first, second = (f"hf:org/data@{commit}?split=a" for commit in (COMMIT, COMMIT[::-1]))
    assert prints(first) != prints(second)
    monkeypatch.setattr(builtins, "version", lambda name: "9.9")
    assert prints(ICD.format("pool")) != [one]


def test_the_order_of_options_does_not_matter(tmp_path):
    first = fingerprint(f"hf:a/b@{COMMIT}?split=x&config=y", tmp_path, tmp_path)
    assert first == fingerprint(f"hf:a/b@{COMMIT}?config=y&split=x", tmp_path, tmp_path)


def test_a_fingerprint_loads_nothing_heavy(tmp_path):
    write(tmp_path / "a.csv", "prompt\nx\n")
    script = (
        "import sys, pathlib; from stillhouse.workers.sources.reader import fingerprint; "
        "here = pathlib.Path(sys.argv[1]); "
        "[fingerprint(ref, here / 'cache', here) for ref in sys.argv[2:]]; "
        "print({'pyarrow', 'datasets', 'torch', 'simple_icd_10_cm'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", script, str(tmp_path), "csv:a.csv", ICD.format("pool")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
