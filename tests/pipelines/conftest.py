"""A small line on scripted models: real files, real Parquet, real DuckDB, no torch."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from stillhouse.configs.load import check
from stillhouse.configs.recipe import RecipeConfig
from stillhouse.pipelines.keys import ancestors
from stillhouse.pipelines.observer import Observer
from stillhouse.pipelines.runner import Runner
from stillhouse.pipelines.stage_run import StageRun
from stillhouse.storage.catalog import Catalog
from stillhouse.storage.manifest import Counts, Manifest, ShardEntry, StageEntry
from stillhouse.storage.records import Record
from stillhouse.storage.shards import write_shard
from stillhouse.workers.protocols import Pair
from stillhouse.workers.scripted import Script, ScriptedWorkers
from tests.killed import Killed

LETTERS = ("A00", "B11", "C22")


def code_of(prompt: str) -> str:
    """What the scripted specialist answers: one of three codes, by the prompt's words."""
    return LETTERS[len(prompt.split()) % 3]


class AnyModel(dict):
    """Scripts for the models of a recipe; whatever else is asked for (an exported copy, a student)
    answers like the student."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> Script:
        return self["student"]


def scripts() -> AnyModel:
    def sure(pair: Pair) -> float:
        return -0.1

    def unsure(pair: Pair) -> float:
        return -2.0 if "common" not in pair.prompt else -0.1

    return AnyModel(
        {
            "base": Script(lambda prompt: "a new thing, of some kind", unsure),
            "base#adapter": Script(code_of, sure),
            "student": Script(code_of, sure),
        }
    )


class Line:
    """A recipe over files in one folder, and what it wrote."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.workers = ScriptedWorkers(scripts())
        self.tree: dict[str, Any] = {
            "name": "line",
            "runs_root": str(home / "runs"),
            "models": {"base": "base", "target": "target", "adapter": "peft:adapter"},
            "data": {
                "pool": [{"ref": self.jsonl("pool", [])}],
                "questions": {"ref": self.jsonl("questions", []), "response": "answer"},
                "heldout_percent": 0,
                "shard_rows": 4,
            },
            "tracking": {"enabled": False},
        }

    def jsonl(self, name: str, rows: Iterable[Mapping[str, Any] | str]) -> str:
        """Write rows (a string is written as it is) and return the reference."""
        path = self.home / f"{name}.jsonl"
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        path.write_text("".join(f"{line}\n" for line in lines))
        return f"jsonl:{path}"

    def pool(self, *texts: str) -> None:
        self.jsonl("pool", ({"prompt": text} for text in texts))

    def questions(self, **answers: str) -> None:
        rows = ({"prompt": text, "answer": answer} for text, answer in answers.items())
        self.jsonl("questions", rows)

    @property
    def recipe(self) -> RecipeConfig:
        return check(self.tree)

    def runner(self, observer: Observer | None = None) -> Runner:
        return Runner(self.recipe, self.workers, content_of, observer or Observer())

    def run(self, until: str | None = None, observer: Observer | None = None) -> Any:
        return self.runner(observer).run(until=until)

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        runner = self.runner()
        with Catalog(runner.folder, Manifest(runner.folder), runner.keys()) as catalog:
            return catalog.rows(sql)

    def stage(self, name: str) -> StageRun:
        """What a stage is given."""
        runner = self.runner()
        keys = runner.keys()
        runner.folder.root.mkdir(parents=True, exist_ok=True)
        return StageRun(
            stage=name,
            key=keys[name],
            recipe=self.recipe,
            folder=runner.folder,
            manifest=Manifest(runner.folder),
            keys={stage: keys[stage] for stage in ancestors(runner.stages(), name)},
            workers=self.workers,
        )

    def commit(self, stage: str, shard: str, **tables: Sequence[Record]) -> None:
        """Write tables by hand as if a stage had written them."""
        run = self.stage(stage)
        files = write_shard(run.folder, stage, run.key, shard, tables)
        run.manifest.append(ShardEntry(stage, run.key, shard, files, Counts(), 0, 0.0))

    def entry(self, stage: str) -> StageEntry:
        runner = self.runner()
        entry = Manifest(runner.folder).stage(stage, runner.keys()[stage])
        assert entry is not None
        return entry


class Notes(Observer):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def note(self, text: str) -> None:
        self.heard.append(text)


class Killer(Observer):
    """Dies when it hears that a shard or a stage is in the journal: its events are not written."""

    def __init__(self, name: str) -> None:
        self._name = name

    def shard_committed(self, entry: ShardEntry) -> None:
        if entry.shard == self._name:
            raise Killed

    def stage_finished(self, entry: StageEntry) -> None:
        if entry.stage == self._name:
            raise Killed


def content_of(ref: str) -> str:
    """A fingerprint of a data file."""
    return hashlib.sha256(Path(ref.partition(":")[2]).read_bytes()).hexdigest()


@pytest.fixture
def line(tmp_path: Path) -> Line:
    return Line(tmp_path)
