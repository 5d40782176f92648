"""Who runs a wave of tasks. This is the seam where a pool of actors takes over."""

import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from stillhouse.pipelines.stage import Stage, Task
from stillhouse.pipelines.stage_run import StageRun
from stillhouse.storage.manifest import Counts, ShardEntry


class Executor(Protocol):
    """Runs tasks of one wave, in any order; shards are written where the work is done."""

    def run(self, stage: Stage, tasks: Sequence[Task], run: StageRun) -> Iterator[ShardEntry]:
        """Yield the entry of each shard once its files are safe."""


class InProcessExecutor:
    """One task after the other, in this process."""

    def run(self, stage: Stage, tasks: Sequence[Task], run: StageRun) -> Iterator[ShardEntry]:
        """See `Executor`."""
        for task in tasks:
            yield from run_task(stage, task, run)


def run_task(stage: Stage, task: Task, run: StageRun) -> Iterator[ShardEntry]:
    """Do a task's work and write its shards.

    The entry named like the task comes last, so a task without that entry is not done. Where the
    parts have numbers, or there are none, it is an entry without files.
    """
    from stillhouse.storage.shards import write_shard

    named = False
    started = time.monotonic()
    for part in stage.work(task, run):
        named = part.part is None
        shard = task.name if part.part is None else f"{task.name}-{part.part:05d}"
        files = write_shard(run.folder, run.stage, run.key, shard, part.rows)
        seconds = time.monotonic() - started
        yield ShardEntry(run.stage, run.key, shard, files, part.counts, part.tokens, seconds)
        started = time.monotonic()
    if not named:
        seconds = time.monotonic() - started
        yield ShardEntry(run.stage, run.key, task.name, (), Counts(), 0, seconds)
