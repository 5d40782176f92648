"""What a run has committed: one line a shard, one line a finished stage.

A line is written after the files it names are in place, so what has a line is whole and what has
none is done again. Only the standard library is needed here: planning a finished run reads this
file and nothing else.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from stillhouse.errors import AccountingError, IntegrityError
from stillhouse.storage.journal import JSON, Journal
from stillhouse.storage.layout import RunFolder

__all__ = [
    "Counts",
    "FileEntry",
    "Manifest",
    "ShardEntry",
    "StageEntry",
    "stage_files",
]


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One committed file; `table` is `artifact` when it holds no rows of ours."""

    table: str
    path: str  # relative to the run folder, with `/`
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Counts:
    """Where a stage's rows went. Every row that came in is in exactly one of the other three."""

    rows_in: int = 0
    kept: int = 0
    rejected: int = 0
    failed: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.rows_in + other.rows_in,
            self.kept + other.kept,
            self.rejected + other.rejected,
            self.failed + other.failed,
        )

    def check(self, stage: str) -> None:
        """Raise AccountingError unless in == kept + rejected + failed, and none is negative."""
        out = self.kept + self.rejected + self.failed
        if self.rows_in == out and min(self.kept, self.rejected, self.failed) >= 0:
            return
        raise AccountingError(
            f"stage {stage}: {self.rows_in} rows came in, but kept {self.kept} + rejected "
            f"{self.rejected} + failed {self.failed} = {out}. The stage lost or doubled rows; "
            "nothing of it is committed. This is an error in the stage, not in the data."
        )


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """A shard whose files are in place."""

    stage: str
    key: str
    shard: str
    files: tuple[FileEntry, ...]
    counts: Counts
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class StageEntry:
    """A finished stage. `files` are its artifacts, such as adapters; rows lie in shards."""

    stage: str
    key: str
    files: tuple[FileEntry, ...]
    counts: Counts
    tokens: int
    seconds: float
    facts: dict[str, JSON] = field(default_factory=dict)


class Manifest:
    """The manifest of a run. One process appends (the lock's holder); any may read meanwhile."""

    def __init__(self, folder: RunFolder) -> None:
        self._journal = Journal(folder.manifest)
        self._read_to = (0, 0)  # byte and line up to which the dictionaries below know the file
        self._shards: dict[tuple[str, str], dict[str, ShardEntry]] = {}
        self._stages: dict[str, list[StageEntry]] = {}

    def append(self, entry: ShardEntry | StageEntry) -> None:
        """Commit `entry`: when this returns its line is on disk. A later line of one shard wins."""
        kind = "shard" if isinstance(entry, ShardEntry) else "stage"
        self._journal.append({"kind": kind, **asdict(entry)})

    def shards(self, stage: str, key: str) -> dict[str, ShardEntry]:
        """Return the committed shards of `stage` under `key`, by name, in order of commit."""
        self._refresh()
        return dict(self._shards.get((stage, key), {}))

    def stage(self, stage: str, key: str) -> StageEntry | None:
        """Return the last entry of `stage` under `key`, or None when it has not finished."""
        entries = (e for e in reversed(self.stages_history(stage)) if e.key == key)
        return next(entries, None)

    def stages_history(self, stage: str) -> list[StageEntry]:
        """Return every entry of `stage`, whatever its key, oldest first."""
        self._refresh()
        return list(self._stages.get(stage, []))

    def _refresh(self) -> None:
        """Read the lines that were added since the last look."""
        for line in self._journal.read(*self._read_to):
            try:
                self._take(line.value)
            except (KeyError, TypeError) as error:
                raise IntegrityError(
                    f"{self._journal.path}, line {line.number}: expected a shard or stage entry, "
                    f"found one that lacks or misnames a field ({error!r}). It was edited, or "
                    "written by another version: cut it there, and what it said is done again."
                ) from error
            self._read_to = (line.end, line.number)

    def _take(self, value: dict[str, JSON]) -> None:
        fields: dict[str, Any] = dict(value)
        kind = fields.pop("kind")
        fields["files"] = tuple(FileEntry(**file) for file in fields["files"])
        fields["counts"] = Counts(**fields["counts"])
        if kind == "shard":
            shard = ShardEntry(**fields)
            self._shards.setdefault((shard.stage, shard.key), {})[shard.shard] = shard
        elif kind == "stage":
            entry = StageEntry(**fields)
            self._stages.setdefault(entry.stage, []).append(entry)
        else:
            raise KeyError(kind)


def stage_files(manifest: Manifest, keys: Mapping[str, str]) -> dict[str, list[FileEntry]]:
    """Return, for each stage of `keys`, all files committed under its key, in order of shard."""
    files: dict[str, list[FileEntry]] = {}
    for stage, key in keys.items():
        shards = sorted(manifest.shards(stage, key).items())
        files[stage] = [file for _, entry in shards for file in entry.files]
        done = manifest.stage(stage, key)
        files[stage] += done.files if done is not None else ()
    return files
