"""Guarantees 10-13 of README.md: a run that is killed anywhere goes on and ends the same.

One run folder goes through a chain of processes. Each is killed (SIGKILL) at its moment, the next
one goes on from what it left, the last one finishes; a clean run in a folder of its own is what
the result is compared with.
"""

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from stillhouse.storage.layout import RunFolder
from stillhouse.storage.manifest import Manifest
from tests.contracts.tiny_run import (
    LIMIT,
    ROOT,
    STAGES,
    environment,
    facts_of,
    keys_of,
    tables_of,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# In the middle of each stage, then at its end. `unfinished` is after the last shard and before the
# stage's own line.
MOMENTS = (
    "torn:ingest:prompts-00001",  # amid a task that streams its parts
    "finished:ingest",
    "step:specialize:13",  # the last checkpoint is of step 10
    "finished:specialize",
    "shard:score:00001",
    "finished:score",
    "shard:select:pool-00000",
    "finished:select",
    "shard:expand:round-02-c-score-00000",
    "finished:expand",
    "shard:curate:candidates-00001",
    "unfinished:curate",
    "finished:curate",
    "step:distill:2",  # before any checkpoint
    "step:distill:16",  # the last checkpoint is of step 15
    "unlisted:distill:train",  # trained, and its tables are not listed
    "finished:distill",
    "shard:evaluate:specialist-00000",
    "finished:evaluate",
    "unlisted:compress:calibrate",
    "shard:compress:measure",
    "finished:compress",
    "shard:deploy:export",
    "finished:deploy",
)
MIDDLES = tuple(moment for moment in MOMENTS if not moment.startswith("finished"))


@dataclass(frozen=True)
class Link:
    """One process of the chain: how it ended, what it did, what the folder held then."""

    moment: str
    code: int
    events: tuple[str, ...]
    shards: dict[str, tuple[str, ...]]
    finished: tuple[str, ...]
    checkpoints: tuple[str, ...]
    err: str


@dataclass(frozen=True)
class Chain:
    """The processes, and the folder they all ran in."""

    links: dict[str, Link]
    folder: RunFolder

    def after(self, moment: str) -> Link:
        """The process that went on from a moment."""
        moments = list(self.links)
        return self.links[moments[moments.index(moment) + 1]]


def run_link(moment: str, home: Path, cache_root: Path) -> Link:
    """Run one process up to its moment and take stock."""
    folder, log = RunFolder(home / "runs" / "tiny"), home / f"{moment.replace(':', '-')}.events"
    log.touch()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.contracts.kill_driver", moment, str(log)),
            *("run", "tiny", f"runs_root={home / 'runs'}"),
        ],
        cwd=ROOT,
        # Another hash seed each time: no order may come from a set or a dict of strings.
        env=environment(cache_root, PYTHONHASHSEED=str(1 + len(moment))),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    manifest, keys = Manifest(folder), keys_of(folder)
    checkpoints = folder.root.glob("stages/*/*/checkpoints/step_*")
    return Link(
        moment=moment,
        code=done.returncode,
        events=tuple(log.read_text().split()),
        shards={stage: tuple(manifest.shards(stage, keys[stage])) for stage in STAGES},
        finished=tuple(stage for stage in STAGES if manifest.stage(stage, keys[stage])),
        checkpoints=tuple(f"{path.parents[2].name}:{path.name}" for path in checkpoints),
        err=done.stderr,
    )


@pytest.fixture(scope="module")
def chain(clean_process, tmp_path_factory, cache_root: Path) -> Chain:
    """The whole chain; the clean run goes on beside it, on the other core."""
    home = tmp_path_factory.mktemp("killed")
    links = {moment: run_link(moment, home, cache_root) for moment in (*MOMENTS, "never")}
    return Chain(links, RunFolder(home / "runs" / "tiny"))


@pytest.mark.parametrize("moment", MOMENTS)
def test_each_process_dies_at_its_moment(chain: Chain, moment: str) -> None:
    link = chain.links[moment]
    assert link.code == -signal.SIGKILL, link.err
    assert link.events[-1] == moment


@pytest.mark.parametrize("moment", MIDDLES)
def test_a_kill_in_the_middle_leaves_the_stage_half_done(chain: Chain, moment: str) -> None:
    kind, stage, *name = moment.split(":")
    link = chain.links[moment]
    before = STAGES[: STAGES.index(stage)]
    assert link.finished == before
    match kind:
        case "shard":
            assert name[0] in link.shards[stage]
        case "unlisted" | "torn":
            assert name[0] not in link.shards[stage]
        case "unfinished":
            assert "examples" in link.shards[stage]  # its last task
        case "step":
            assert not link.shards[stage]
            assert (f"{stage}:step_" in " ".join(link.checkpoints)) == (int(name[0]) > 2)


@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_at_the_boundary_leaves_the_stage_finished(chain: Chain, stage: str) -> None:
    link = chain.links[f"finished:{stage}"]
    place = STAGES.index(stage)
    assert link.finished == STAGES[: place + 1]
    assert not any(link.shards[later] for later in STAGES[place + 1 :])


@pytest.mark.parametrize(
    "moment",
    [
        "shard:score:00001",
        "shard:expand:round-02-c-score-00000",
        "shard:evaluate:specialist-00000",
        "shard:compress:measure",
        "shard:deploy:export",
    ],
)
def test_what_was_committed_is_not_done_again(chain: Chain, moment: str) -> None:
    _, stage, name = moment.split(":")
    after = chain.after(moment)
    assert f"unlisted:{stage}:{name}" not in after.events
    assert f"{stage}: {len(chain.links[moment].shards[stage])} shards cached" in after.err


@pytest.mark.parametrize(
    ("moment", "task"),
    [
        ("torn:ingest:prompts-00001", "ingest:prompts-00000"),
        ("shard:select:pool-00000", "select:pool-00000"),
        ("shard:curate:candidates-00001", "curate:candidates-00000"),
    ],
)
def test_a_task_stopped_between_its_parts_is_done_again(
    chain: Chain, moment: str, task: str
) -> None:
    """Its parts may depend on each other; the task's own line says that it is done."""
    assert f"shard:{task}" in chain.after(moment).events


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_stage_is_started_once_more_by_nobody(chain: Chain, stage: str) -> None:
    moments = list(chain.links)
    later = moments[moments.index(f"finished:{stage}") + 1 :]
    assert all(f"started:{stage}" not in chain.links[moment].events for moment in later)


@pytest.mark.parametrize(
    ("moment", "first"),
    [("step:specialize:13", 11), ("step:distill:2", 1), ("step:distill:16", 16)],
)
def test_training_goes_on_from_its_checkpoint(chain: Chain, moment: str, first: int) -> None:
    steps = [event for event in chain.after(moment).events if event.startswith("step:")]
    assert steps[0] == f"step:{moment.split(':')[1]}:{first}"


def test_a_training_that_ran_to_its_end_is_not_repeated(chain: Chain) -> None:
    link = chain.after("unlisted:distill:train")
    assert not [event for event in link.events if event.startswith("step:")]
    assert "shard:distill:train" in link.events


def test_the_last_process_finishes(chain: Chain) -> None:
    link = chain.links["never"]
    assert link.code == 0, link.err
    assert link.finished == STAGES


@pytest.mark.parametrize("stage", STAGES)
def test_every_file_is_that_of_a_clean_run(chain: Chain, clean_run: RunFolder, stage: str) -> None:
    killed, clean = tables_of(chain.folder, stage), tables_of(clean_run, stage)
    assert killed == clean
    assert killed, f"{stage} wrote nothing"


@pytest.mark.parametrize("stage", STAGES)
def test_the_manifest_says_the_same(chain: Chain, clean_run: RunFolder, stage: str) -> None:
    assert keys_of(chain.folder) == keys_of(clean_run)
    assert facts_of(chain.folder, stage) == facts_of(clean_run, stage)


@pytest.mark.parametrize("stage", ["specialize", "distill"])
def test_the_loss_curve_is_the_same_to_the_bit(
    chain: Chain, clean_run: RunFolder, stage: str
) -> None:
    killed, clean = (loss_curve(folder, stage) for folder in (chain.folder, clean_run))
    assert killed == clean
    assert len(clean) > 20


def loss_curve(folder: RunFolder, stage: str) -> list[tuple[int, str, str]]:
    """Step, loss and gradient norm; floats as hex, so that equal means equal bits."""
    from stillhouse.storage.catalog import Catalog

    with Catalog(folder, Manifest(folder), keys_of(folder)) as catalog:
        rows = catalog.rows(
            "SELECT step, loss, gradient_norm FROM train_steps WHERE stage = ? ORDER BY step",
            [stage],
        )
    return [(step, loss.hex(), norm.hex()) for step, loss, norm in rows]


def test_the_report_is_the_same_but_for_times(chain: Chain, clean_run: RunFolder) -> None:
    assert timeless(chain.folder) == timeless(clean_run)


def timeless(folder: RunFolder) -> dict:
    report = json.loads(folder.report.read_text())
    for stage in report["stages"].values():
        del stage["seconds"], stage["tokens_per_second"]
    return report


def test_nothing_half_written_stays(chain: Chain) -> None:
    patterns = (".*.tmp", ".partial-*", ".spill*")
    assert [path for pattern in patterns for path in chain.folder.root.rglob(pattern)] == []
