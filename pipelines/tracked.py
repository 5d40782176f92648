"""A run that is logged: its events go to a local file first and from there to MLflow.

The server may be away at any time. The run goes on, the events stay in the file, and the next
start uploads what is missing. A kill may come between what the manifest or the report says and its
events: the next start finds that the file lacks them and writes them then. What was done while
`tracking.enabled` was off is told in the same way by the first start that has it on (but for the
figures along the way, such as each step's loss, which nobody wrote down).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from stillhouse.configs.recipe import RecipeConfig
from stillhouse.errors import StillhouseError, TrackingError
from stillhouse.pipelines.local import local_runner
from stillhouse.pipelines.logged_events import LoggedEvents
from stillhouse.pipelines.observer import Observer, Observers
from stillhouse.pipelines.presets import chain
from stillhouse.pipelines.runner import Resume
from stillhouse.storage.events import EventLog
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.manifest import FileEntry, Manifest, StageEntry
from stillhouse.storage.tracking.database import default_uri
from stillhouse.storage.tracking.tracker import Tracker
from stillhouse.workers.models.model_folder import MANIFEST


def run_tracked(
    recipe: RecipeConfig, console: Observer, resume: Resume = "auto", until: str | None = None
) -> Mapping[str, Any]:
    """Run a recipe and log it, unless `tracking.enabled` is off; return the report."""
    if not recipe.tracking.enabled:
        return local_runner(recipe, console).run(resume, until)
    tracking = TrackingObserver(recipe, console)
    runner = local_runner(recipe, Observers((console, tracking)))
    try:
        return runner.run(resume, until)
    except (StillhouseError, KeyboardInterrupt) as error:
        tracking.run_stopped(error)
        raise


class TrackingObserver(Observer):
    """Writes a run's events down and uploads them at the end of every stage."""

    def __init__(self, recipe: RecipeConfig, console: Observer) -> None:
        self._recipe = recipe
        self._console = console
        self._folder = RunFolder(Path(recipe.runs_root) / recipe.name)
        self._log = EventLog(self._folder)
        uri = recipe.tracking.uri or default_uri(Path(recipe.runs_root))
        experiment = recipe.tracking.experiment
        self._tracker = Tracker(self._folder, self._log, uri, experiment, recipe.name)
        self._started = self._said_away = False
        self._open: tuple[str, str] | None = None  # the stage that is under way, and its key
        self._keys: Mapping[str, str] = {}

    def run_opened(self, keys: Mapping[str, str]) -> None:
        """Upload what an earlier start could not."""
        self._keys = keys
        self._upload()
        if self._tracker.is_behind():
            self._say_if_away()

    def run_started(self, keys: Mapping[str, str]) -> None:
        self._started = True
        self._say_if_away()
        params = self._recipe.model_dump(mode="json")
        tags = {f"stillhouse.key.{stage}": key for stage, key in keys.items()}
        self._log.emit("run_started", params=params, tags=tags)

    def _say_if_away(self) -> None:
        if self._said_away or (why := self._tracker.probe()) is None:
            return
        self._said_away = True
        self._console.note(
            f"MLflow cannot be reached: {why}. Events are kept in {self._folder.events} and "
            "uploaded by the next start that reaches it"
        )

    def stage_started(self, stage: str, key: str, reused_shards: int) -> None:
        section = getattr(self._recipe, stage, None)
        params = {} if section is None else section.model_dump(mode="json")
        self._open = (stage, key)
        self._log.emit("stage_started", stage, key=key, params=params)

    def metric(self, stage: str, name: str, value: float, step: int) -> None:
        self._log.emit("metric", stage, name=name, value=value, step=step)

    def stage_cached(self, entry: StageEntry) -> None:
        """Tell what the log lacks of a stage that was finished before; the server takes it twice
        without harm where only a part was missing.
        """
        if (entry.stage, entry.key) in self._logged.stages:
            return
        self._begin()
        self.stage_started(entry.stage, entry.key, 0)
        self.stage_finished(entry)

    def stage_finished(self, entry: StageEntry) -> None:
        for table, files in self._tables(entry.stage).items():
            self._log.emit("dataset", entry.stage, **self._dataset(entry, table, files))
        if entry.stage == "deploy":
            self._register(entry)
        self._log.emit(
            "stage_finished",
            entry.stage,
            key=entry.key,
            counts=asdict(entry.counts),
            seconds=entry.seconds,
            tokens=entry.tokens,
            status="finished",
        )
        self._open = None
        self._upload()

    def run_finished(self, report: Mapping[str, Any]) -> None:
        self._log.emit("artifact", path=self._folder.relative(self._folder.report))
        metrics = {key: report[key] for key in _HEADLINES if key in report}
        digest = self._report_digest()
        self._log.emit("run_finished", status="finished", metrics=metrics, report=digest)
        self._upload()

    def run_cached(self, report: Mapping[str, Any]) -> None:
        """Tell the result where the log's last word is another one."""
        if self._started or self._logged.report != self._report_digest():
            self._begin()
            self.run_finished(report)

    def run_stopped(self, error: StillhouseError | KeyboardInterrupt) -> None:
        """Say how the run and its stage ended; the error itself is told by whoever caught it."""
        if not self._started:
            return
        status = "killed" if isinstance(error, KeyboardInterrupt) else "failed"
        if self._open is not None:
            stage, key = self._open
            self._log.emit("stage_finished", stage, key=key, status=status)
        self._log.emit("run_finished", status=status, metrics={})
        self._upload()

    def _begin(self) -> None:
        if not self._started:
            self.run_started(self._keys)

    @cached_property
    def _logged(self) -> LoggedEvents:
        return LoggedEvents.read(self._log)

    def _report_digest(self) -> str:
        return hashlib.sha256(self._folder.report.read_bytes()).hexdigest()[:16]

    def _upload(self) -> None:
        """A refusal does not stop the work: the events stay, and the next upload tries again."""
        try:
            self._tracker.flush()
        except TrackingError as error:
            self._console.note(str(error))

    @cached_property
    def _manifest(self) -> Manifest:
        """Made when it is first asked, because `--resume never` begins a new file."""
        return Manifest(self._folder)

    def _tables(self, stage: str) -> dict[str, list[FileEntry]]:
        """The files that a stage has under its key of this run, by table, in order of shard."""
        tables: dict[str, list[FileEntry]] = {}
        for _, shard in sorted(self._manifest.shards(stage, self._keys[stage]).items()):
            for file in shard.files:
                tables.setdefault(file.table, []).append(file)
        return tables

    def _dataset(self, entry: StageEntry, table: str, files: list[FileEntry]) -> dict[str, Any]:
        after = next(s.after for s in chain(self._recipe) if s.name == entry.stage)
        path = self._folder.stage_dir(entry.stage, entry.key) / table
        parents = [self._names(parent) for parent in after if parent in self._keys]
        return {
            "name": f"{entry.stage}.{table}",
            "path": self._folder.relative(path),
            "digest": _digest(files),
            "rows": sum(file.rows for file in files),
            "source": f"stage {entry.stage}, key {entry.key}",
            "parents": [name for names in parents for name in names],
        }

    def _names(self, stage: str) -> list[dict[str, str]]:
        """Names and digests of the data sets that a stage wrote, as `_dataset` gives them."""
        return [
            {"name": f"{stage}.{table}", "digest": _digest(files)}
            for table, files in self._tables(stage).items()
        ]

    def _register(self, entry: StageEntry) -> None:
        facts = entry.facts
        if facts["refused"]:
            return
        [manifest] = [file for file in entry.files if Path(file.path).name == MANIFEST]
        tags = {
            "stillhouse.key.deploy": entry.key,
            "stillhouse.run": self._recipe.name,
            "stillhouse.manifest": manifest.sha256,  # from a folder to its version and its run
        }
        name, evaluate = facts["name"], self._recipe.evaluate
        self._log.emit(
            "model",
            entry.stage,
            path=facts["model"],  # relative to the run folder, as the files in the manifest
            name=name,
            task="text-generation",
            decoding={"max_new_tokens": evaluate.max_new_tokens, "stop": list(evaluate.stop)},
            tags=tags,
            digest=_digest(entry.files),
        )
        if facts["promoted"]:
            self._log.emit("promote", entry.stage, name=name)


def _digest(files: Sequence[FileEntry]) -> str:
    return hashlib.sha256("".join(file.sha256 for file in files).encode()).hexdigest()[:16]


_HEADLINES = ("accuracy", "perplexity", "recovery", "selection", "cache")
