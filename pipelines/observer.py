"""Who listens to a run: the console, the tracker, a test."""

from collections.abc import Mapping, Sequence
from typing import Any

from stillhouse.storage.manifest import ShardEntry, StageEntry


class Observer:
    """Hears of a run's events; this one ignores them all."""

    def note(self, text: str) -> None:
        """Something a user should know."""

    def run_opened(self, keys: Mapping[str, str]) -> None:
        """The run is ours: its lock is held. `keys` are those of all its stages."""

    def run_started(self, keys: Mapping[str, str]) -> None:
        """There is work to do."""

    def stage_cached(self, entry: StageEntry) -> None:
        """A stage was finished before and is reused."""

    def stage_started(self, stage: str, key: str, reused_shards: int) -> None:
        """A stage starts, or goes on with so many shards committed."""

    def progress(self, stage: str, done: int, total: int, unit: str) -> None:
        """So much of a stage is done."""

    def metric(self, stage: str, name: str, value: float, step: int) -> None:
        """A figure along the way."""

    def shard_committed(self, entry: ShardEntry) -> None:
        """A shard is safe."""

    def stage_finished(self, entry: StageEntry) -> None:
        """A stage is done and its rows add up."""

    def run_finished(self, report: Mapping[str, Any]) -> None:
        """The whole line is done."""

    def run_cached(self, report: Mapping[str, Any]) -> None:
        """The whole line was done and reported before."""


class Observers(Observer):
    """Several observers, told in order."""

    def __init__(self, members: Sequence[Observer]) -> None:
        self._members = tuple(members)

    def note(self, text: str) -> None:
        for member in self._members:
            member.note(text)

    def run_opened(self, keys: Mapping[str, str]) -> None:
        for member in self._members:
            member.run_opened(keys)

    def run_started(self, keys: Mapping[str, str]) -> None:
        for member in self._members:
            member.run_started(keys)

    def stage_cached(self, entry: StageEntry) -> None:
        for member in self._members:
            member.stage_cached(entry)

    def stage_started(self, stage: str, key: str, reused_shards: int) -> None:
        for member in self._members:
            member.stage_started(stage, key, reused_shards)

    def progress(self, stage: str, done: int, total: int, unit: str) -> None:
        for member in self._members:
            member.progress(stage, done, total, unit)

    def metric(self, stage: str, name: str, value: float, step: int) -> None:
        for member in self._members:
            member.metric(stage, name, value, step)

    def shard_committed(self, entry: ShardEntry) -> None:
        for member in self._members:
            member.shard_committed(entry)

    def stage_finished(self, entry: StageEntry) -> None:
        for member in self._members:
            member.stage_finished(entry)

    def run_finished(self, report: Mapping[str, Any]) -> None:
        for member in self._members:
            member.run_finished(report)

    def run_cached(self, report: Mapping[str, Any]) -> None:
        for member in self._members:
            member.run_cached(report)
