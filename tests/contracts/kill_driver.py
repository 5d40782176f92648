"""The real command line, in a process that kills itself (SIGKILL) at a given moment.

    python -m tests.contracts.kill_driver MOMENT LOG run tiny runs_root=…

Moments: `started:STAGE`, `shard:STAGE:NAME` (its line is on disk), `unlisted:STAGE:NAME` (its files
are in place, its line is not), `torn:STAGE:NAME` (half of its line is on disk), `unfinished:STAGE`
(all its shards are listed, the stage is not), `step:STAGE:N`, `finished:STAGE`, `never`.
Every event is written to LOG, so that a test can see what this process did.
"""

import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

from stillhouse.cli import console, main
from stillhouse.storage.manifest import Manifest, ShardEntry, StageEntry

MOMENT, LOG = sys.argv[1], Path(sys.argv[2])


def reach(moment: str) -> None:
    """Write the moment down, and die there if it is the one."""
    with LOG.open("a") as log:
        log.write(moment + "\n")
    if moment == MOMENT:
        os.kill(os.getpid(), signal.SIGKILL)


class KillingConsole(console.Console):
    """Prints like the console, until the moment comes."""

    def stage_started(self, stage: str, key: str, reused_shards: int) -> None:
        super().stage_started(stage, key, reused_shards)
        reach(f"started:{stage}")

    def progress(self, stage: str, done: int, total: int, unit: str) -> None:
        super().progress(stage, done, total, unit)
        if unit == "steps":
            reach(f"step:{stage}:{done}")

    def shard_committed(self, entry: ShardEntry) -> None:
        super().shard_committed(entry)
        reach(f"shard:{entry.stage}:{entry.shard}")

    def stage_finished(self, entry: StageEntry) -> None:
        super().stage_finished(entry)
        reach(f"finished:{entry.stage}")


def killing_append(manifest: Manifest, entry: ShardEntry | StageEntry) -> None:
    """`Manifest.append`, with the moments before and amid it."""
    if isinstance(entry, StageEntry):
        reach(f"unfinished:{entry.stage}")
    else:
        reach(f"unlisted:{entry.stage}:{entry.shard}")
        if f"torn:{entry.stage}:{entry.shard}" == MOMENT:
            tear({"kind": "shard", **asdict(entry)}, manifest)
    whole_append(manifest, entry)


def tear(value: dict[str, Any], manifest: Manifest) -> None:
    """Write half of a line, as a power cut would leave it."""
    path: Path = manifest._journal.path
    line = json.dumps(value).encode()
    with path.open("ab") as file:
        file.write(line[: len(line) // 2])
        file.flush()
        os.fsync(file.fileno())
    reach(MOMENT)


whole_append = Manifest.append
sys.argv = ["stillhouse", *sys.argv[3:]]
with (
    patch.object(console, "Console", KillingConsole),
    patch.object(Manifest, "append", killing_append),
):
    main()
