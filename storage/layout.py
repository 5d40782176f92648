"""Where everything of a run lies; the only place that spells a run folder's paths.

runs/<name>/
    recipe.resolved.json  plan.json  manifest.jsonl  events.jsonl  report.json
    logs/  .lock  .verified.json  .tracking/  .spill-<host>@<pid>@<number>/
    stages/<stage>/<key>/
        <table>/part-<shard>.parquet
        adapter/  checkpoints/step_<n>/    of what trains: specialize, distill, evaluate/ceiling
        model/                             the exported student, of deploy
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The paths of one run. Nothing is created by asking for a path."""

    root: Path

    @property
    def manifest(self) -> Path:
        """What has been committed, one line a shard or stage."""
        return self.root / "manifest.jsonl"

    @property
    def recipe(self) -> Path:
        """The recipe with its inheritance and overrides resolved."""
        return self.root / "recipe.resolved.json"

    @property
    def plan(self) -> Path:
        """The current recipe's keys: `{stage: key}`."""
        return self.root / "plan.json"

    @property
    def events(self) -> Path:
        """What happened, in order; tracking uploads from here."""
        return self.root / "events.jsonl"

    @property
    def logs(self) -> Path:
        """The folder of log files."""
        return self.root / "logs"

    @property
    def report(self) -> Path:
        """The run's result for programs."""
        return self.root / "report.json"

    @property
    def lock(self) -> Path:
        """The file whose lock says who runs this run."""
        return self.root / ".lock"

    @property
    def verified(self) -> Path:
        """The hashes that were checked, so that unchanged files are not read again."""
        return self.root / ".verified.json"

    @property
    def tracking(self) -> Path:
        """How far each tracking server has been told, and the ids it gave."""
        return self.root / ".tracking"

    def spill(self, name: str) -> Path:
        """Return the folder where one query puts what does not fit in memory.

        It lies in the run folder itself: DuckDB makes it on demand, but no folder above it.
        """
        return self.root / f".spill-{name}"

    def stage_dir(self, stage: str, key: str) -> Path:
        """Return the folder of all that `stage` wrote under `key`."""
        return self.root / "stages" / stage / key

    def shard_path(self, stage: str, key: str, table: str, shard: str) -> Path:
        """Return the Parquet file of one table of one shard."""
        return self.stage_dir(stage, key) / table / f"part-{shard}.parquet"

    def relative(self, path: Path) -> str:
        """Return `path` as manifests write it: relative to the run folder, with `/`.

        Raises ValueError when `path` lies outside the run folder.
        """
        return path.resolve().relative_to(self.root.resolve()).as_posix()

    def absolute(self, path: str) -> Path:
        """Return the absolute path of what `relative` named, wherever the run folder lies now."""
        return (self.root / path).resolve()
