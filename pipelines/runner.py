"""Run a recipe: reuse what is finished and unchanged, do the rest, account for every row."""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from stillhouse.configs.recipe import RecipeConfig
from stillhouse.errors import AccountingError, ConfigError
from stillhouse.pipelines.executor import Executor, InProcessExecutor
from stillhouse.pipelines.keys import Fingerprint, ancestors, stage_keys
from stillhouse.pipelines.observer import Observer
from stillhouse.pipelines.presets import chain
from stillhouse.pipelines.report import build_report
from stillhouse.pipelines.stage import Stage, Task
from stillhouse.pipelines.stage_run import StageRun
from stillhouse.pipelines.training_clock import carried_seconds
from stillhouse.storage.durable import replace_file, sweep
from stillhouse.storage.integrity import verify
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.lock import RunLock
from stillhouse.storage.manifest import Counts, Manifest, StageEntry
from stillhouse.storage.redaction import redacted
from stillhouse.storage.strict_json import json_text
from stillhouse.workers.protocols import Workers

Resume = Literal["auto", "never", "must"]


@dataclass(frozen=True, slots=True)
class Runner:
    """A recipe, who does its work and who listens."""

    recipe: RecipeConfig
    workers: Workers
    data_fingerprint: Fingerprint
    observer: Observer = field(default_factory=Observer)
    executor: Executor = field(default_factory=InProcessExecutor)

    @property
    def folder(self) -> RunFolder:
        """The run's folder."""
        return RunFolder(Path(self.recipe.runs_root) / self.recipe.name)

    def stages(self) -> tuple[Stage, ...]:
        """The recipe's stages, in order."""
        return chain(self.recipe)

    def keys(self) -> dict[str, str]:
        """Each stage's key."""
        return stage_keys(
            self.stages(), self.recipe, self.workers.fingerprint, self.data_fingerprint
        )

    def run(self, resume: Resume = "auto", until: str | None = None) -> Mapping[str, Any]:
        """Run every stage up to `until`; return the report, which is also in `report.json`.

        Raises LockedError where another process runs this run, IntegrityError where a committed
        file was changed, ConfigError where `resume` is "must" and there is nothing to go on with.
        """
        stages, keys = self._chosen(until), self.keys()
        if resume == "must" and not self.folder.manifest.is_file():
            raise self._nothing_to_resume()
        self._make_folder()
        with RunLock(self.folder):
            self.observer.run_opened(keys)
            manifest = self._start(resume, keys)
            fresh = not self._is_reported(manifest, keys, stages)
            if fresh:
                self.observer.run_started(keys)
            for stage in stages:
                entry = manifest.stage(stage.name, keys[stage.name])
                if entry is not None:
                    self._check(manifest, entry)
                    self.observer.stage_cached(entry)
                    continue
                self._run_stage(stage, manifest, keys)
            report = build_report(self.recipe, manifest, keys)
            if fresh:
                self._write_json(self.folder.report, report)
                self.observer.run_finished(report)
            else:
                self.observer.run_cached(report)
        return report

    def _make_folder(self) -> None:
        try:
            self.folder.root.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise ConfigError(
                f"runs_root: expected a folder that can be written, found {error}; give another"
            ) from error

    def _nothing_to_resume(self) -> ConfigError:
        return ConfigError(
            f"--resume must: {self.folder.root} holds no shard of this recipe; "
            "check the recipe and its overrides, or run with --resume auto"
        )

    def _chosen(self, until: str | None) -> Sequence[Stage]:
        stages = self.stages()
        names = [stage.name for stage in stages]
        if until is None:
            return stages
        if until not in names:
            raise ConfigError(f"no stage {until!r}: expected one of {', '.join(names)}")
        return stages[: names.index(until) + 1]

    def _start(self, resume: Resume, keys: Mapping[str, str]) -> Manifest:
        manifest = Manifest(self.folder)
        started = any(manifest.shards(name, key) for name, key in keys.items())
        if resume == "must" and not started:
            raise self._nothing_to_resume()
        if resume == "never":
            self.folder.manifest.unlink(missing_ok=True)  # first: a line needs its file
            shutil.rmtree(self.folder.root / "stages", ignore_errors=True)
            self.folder.report.unlink(missing_ok=True)
            manifest = Manifest(self.folder)
        sweep(self.folder)
        recipe = redacted("", self.recipe.model_dump(mode="json"))  # for people: never read back
        self._write_json(self.folder.recipe, recipe)
        self._write_json(self.folder.plan, keys)
        return manifest

    def _is_reported(
        self, manifest: Manifest, keys: Mapping[str, str], stages: Sequence[Stage]
    ) -> bool:
        """Whether all is done and told; a kill may come between the last stage and the report."""
        if not all(manifest.stage(stage.name, keys[stage.name]) for stage in stages):
            return False
        if not self.folder.report.is_file():
            return False
        try:
            report = json.loads(self.folder.report.read_text(encoding="utf-8"))
            told = {stage.name for stage in stages} <= report["stages"].keys()
            return told and bool(report["keys"] == dict(keys))
        except (ValueError, KeyError, TypeError, AttributeError):
            return False  # edited or of another version: it is written anew

    def _write_json(self, path: Path, value: object) -> None:
        # Keys stay in the order of the line, in which `status` and `report` print them.
        replace_file(path, (json_text(value, path, indent=2) + "\n").encode())

    def _check(self, manifest: Manifest, entry: StageEntry) -> None:
        shards = manifest.shards(entry.stage, entry.key).values()
        verify(self.folder, [*entry.files, *(file for shard in shards for file in shard.files)])

    def _run_stage(self, stage: Stage, manifest: Manifest, keys: Mapping[str, str]) -> None:
        names = ancestors(self.stages(), stage.name)
        run = StageRun(
            stage=stage.name,
            key=keys[stage.name],
            recipe=self.recipe,
            folder=self.folder,
            manifest=manifest,
            keys={name: keys[name] for name in names},
            workers=self.workers,
            observer=self.observer,
        )
        committed = manifest.shards(stage.name, run.key)
        verify(self.folder, [file for shard in committed.values() for file in shard.files])
        due = stage.tasks_due(run)
        self.observer.stage_started(stage.name, run.key, len(committed))
        earlier = sum(shard.seconds for shard in committed.values())
        started = time.monotonic()
        before = 0
        for wave in stage.waves(run):
            self._run_wave(stage, wave, run, before, due)
            before += len(wave)
        outcome = stage.finish(run)
        shards = manifest.shards(stage.name, run.key).values()
        counts = sum((shard.counts for shard in shards), Counts())
        counts.check(stage.name)
        _check_due(stage.name, stage.rows_due(run), counts)
        spent = time.monotonic() - started
        entry = StageEntry(
            stage=stage.name,
            key=run.key,
            files=outcome.files,
            counts=counts,
            tokens=sum(shard.tokens for shard in shards),
            seconds=earlier + carried_seconds(self.folder, stage.name, run.key) + spent,
            facts=dict(outcome.facts),
        )
        manifest.append(entry)
        self.observer.stage_finished(entry)

    def _run_wave(
        self, stage: Stage, wave: Sequence[Task], run: StageRun, before: int, due: int | None
    ) -> None:
        """Do the tasks that are not done; `before` tasks of `due` in all were in earlier waves."""
        done = run.manifest.shards(stage.name, run.key)
        waiting = [task for task in wave if task.name not in done]
        names = {task.name for task in waiting}
        finished = before + len(wave) - len(waiting)
        total = before + len(wave) if due is None else due
        self.observer.progress(stage.name, finished, total, "tasks")
        for entry in self.executor.run(stage, waiting, run):
            run.manifest.append(entry)
            self.observer.shard_committed(entry)
            finished += entry.shard in names
            self.observer.progress(stage.name, finished, total, "tasks")


def _check_due(stage: str, due: int | None, counts: Counts) -> None:
    if due is not None and due != counts.rows_in:
        raise AccountingError(
            f"stage {stage}: {due} rows were due from the stages before it, {counts.rows_in} came "
            "in. The stage lost or doubled rows; it is not committed. This is an error in the "
            "stage, not in the data."
        )
