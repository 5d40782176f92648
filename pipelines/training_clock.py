"""How long a training took where it took several processes.

A training that was killed goes on from its checkpoint, and its tokens are those of all its steps;
so must be its seconds, or the rate is that of nobody. They are no part of the checkpoint, whose
bytes a kill must not change: they lie in the run's logs, one line a process that begins and one a
step. A step that was lost with a kill and done again counts once. A log that is deleted or cut
short by a power cut makes the stage look faster than it was, and changes nothing else.
"""

import time
from pathlib import Path
from typing import cast

from stillhouse.storage.journal import Journal
from stillhouse.storage.layout import RunFolder


class TrainingClock:
    """Writes down the seconds of each step of one training, in this process."""

    def __init__(self, folder: RunFolder, training: Path) -> None:
        """`training` is the training's own folder, under that of its stage."""
        parts = training.relative_to(folder.root / "stages").parts
        self._journal = Journal(folder.logs / f"training-{'-'.join(parts)}.jsonl")
        self._last = time.monotonic()
        self._write(0, 0.0)  # a process begins

    def step(self, number: int) -> None:
        """A step is done, and its checkpoint, if it has one, is safe."""
        now = time.monotonic()
        self._write(number, now - self._last)
        self._last = now

    def _write(self, step: int, seconds: float) -> None:
        self._journal.append({"step": step, "seconds": seconds}, sync=False)


def carried_seconds(folder: RunFolder, stage: str, key: str) -> float:
    """Return what earlier processes spent on the steps that the last process found done."""
    paths = folder.logs.glob(f"training-{stage}-{key}*.jsonl")
    return sum(_carried(path) for path in paths)


def _carried(path: Path) -> float:
    spent: dict[int, float] = {}  # by step; a step that was done again counts as it was last
    before: dict[int, float] = {}
    first: int | None = None  # step of the last process
    for line in Journal(path).read():
        step, seconds = cast(int, line.value["step"]), cast(float, line.value["seconds"])
        if step == 0:
            before, first = dict(spent), None
        else:
            first = first or step
            spent[step] = seconds
    return sum(seconds for step, seconds in before.items() if first is None or step < first)
