"""A training that was stopped goes on, and ends as if it had not been."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse.errors import ConfigError, StorageFullError
from stillhouse.workers import trainer
from stillhouse.workers.folders import is_sealed
from tests.killed import Killed
from tests.workers.small_training import TOTAL, files_of, ignore, stop_after

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from stillhouse.configs.stages import TrainConfig
from stillhouse.workers.local import LocalWorkers
from stillhouse.workers.protocols import ModelSpec, TrainExample, TrainJob
given = json.loads(sys.argv[2])
job = TrainJob(
    ModelSpec(given["model"]),
    [TrainExample(*row) for row in given["examples"]],
    TrainConfig.model_validate(given["config"]),
    Path(given["folder"]),
)
def on_step(step, total):
    print(step.step, step.loss.hex(), flush=True)
    if step.step == given["kill_after"]:
        os.kill(os.getpid(), signal.SIGKILL)
LocalWorkers(Path(given["cache"]), threads=1).train(job, on_step)
"""


def run_process(job, cache, kill_after):
    """Train in a process of its own, killed after a step; its exit code and its lines."""
    given = {
        "model": job.model.ref,
        "examples": [dataclasses.astuple(example) for example in job.examples],
        "config": job.config.model_dump(mode="json"),
        "folder": str(job.folder),
        "cache": str(cache),
        "kill_after": kill_after,
    }
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, root, json.dumps(given)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode in {0, -signal.SIGKILL}, done.stderr
    return done.returncode, done.stdout.split("\n")[:-1]


def test_killed_and_resumed_is_the_same_to_the_bit(job, tmp_path):
    clean, killed = job("clean"), job("killed")
    code, losses = run_process(clean, tmp_path, None)
    assert (code, len(losses)) == (0, TOTAL)
    code, first = run_process(killed, tmp_path, 5)  # between the checkpoints of steps 4 and 6
    assert code == -signal.SIGKILL
    assert not (killed.folder / "adapter").exists()
    code, second = run_process(killed, tmp_path, None)
    assert code == 0
    assert second == losses[4:]  # goes on after step 4
    assert first == losses[:5]
    assert files_of(killed.folder / "adapter") == files_of(clean.folder / "adapter")


def stopped(fresh, job, after):
    """The job, its training killed after a step."""
    with pytest.raises(Killed):
        trainer.train(fresh(), job, stop_after(after))
    return job


@pytest.mark.parametrize("last", range(1, TOTAL + 1))
def test_stopped_after_any_step_and_resumed(fresh, job, last):
    clean = trainer.train(fresh(), job("clean", checkpoint_steps=1), ignore)
    broken = stopped(fresh, job("broken", checkpoint_steps=1), after=last)
    resumed = trainer.train(fresh(), broken, ignore)
    assert resumed.steps == clean.steps
    assert files_of(resumed.adapter) == files_of(clean.adapter)


def test_a_torn_checkpoint_is_passed_over_for_the_one_before(fresh, job):
    clean = trainer.train(fresh(), job("clean"), ignore)
    broken = stopped(fresh, job("broken"), after=5)
    torn = broken.folder / "checkpoints" / "step_4" / "adapter.safetensors"
    torn.write_bytes(torn.read_bytes()[:-8])
    said: list[str] = []
    heard: list[int] = []
    resumed = trainer.train(
        fresh(), broken, lambda step, total: heard.append(step.step), said.append
    )
    assert said == ["checkpoint step_4 is torn or was changed: passed over"]
    assert heard == list(range(3, TOTAL + 1))
    assert resumed.steps == clean.steps
    assert files_of(resumed.adapter) == files_of(clean.adapter)


def test_a_torn_checkpoint_takes_no_place_of_a_whole_one(fresh, job):
    broken = stopped(fresh, job("broken", checkpoint_steps=1, keep_checkpoints=2), after=5)
    folder = broken.folder / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step_4", "step_5"]
    torn = folder / "step_5" / "adapter.safetensors"
    torn.write_bytes(torn.read_bytes()[:-8])
    again = stopped(fresh, job("broken", checkpoint_steps=99, keep_checkpoints=1), after=6)
    assert [path.name for path in (again.folder / "checkpoints").iterdir()] == ["step_4"]


def test_what_a_kill_left_of_a_half_written_checkpoint_is_no_checkpoint(fresh, job):
    clean = trainer.train(fresh(), job("clean"), ignore)
    broken = stopped(fresh, job("broken"), after=3)
    half = broken.folder / "checkpoints" / ".partial-step_4"
    half.mkdir()
    (half / "adapter.safetensors").write_bytes(b"half")
    assert trainer.train(fresh(), broken, ignore).steps == clean.steps
    assert not half.exists()


def test_only_the_newest_checkpoints_stay_and_none_holds_a_pickle(fresh, job):
    trained = job()
    trainer.train(fresh(), trained, ignore)
    folder = trained.folder / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step_6", "step_8"]
    names = {path.name for path in (folder / "step_8").iterdir()}
    assert names == {"adapter.safetensors", "optimizer.safetensors", "state.json", "hashes.json"}


def test_a_finished_job_answers_from_its_record(fresh, job):
    outcome = trainer.train(fresh(), job(), ignore)

    def refuse(step, total):
        raise AssertionError("trained again")

    assert trainer.train(fresh(), job(checkpoint_steps=7), refuse) == outcome  # a knob


@pytest.mark.parametrize("last", [3, None])
def test_the_folder_of_another_job_is_refused(fresh, job, last):
    try:
        trainer.train(fresh(), job(), stop_after(last))
    except Killed:
        assert last == 3
    with pytest.raises(ConfigError, match=r"another training.*another folder"):
        trainer.train(fresh(), job(learning_rate=5e-3), ignore)


def test_an_adapter_changed_by_hand_is_made_again_from_the_checkpoint(fresh, job):
    outcome = trainer.train(fresh(), job(), ignore)
    before = files_of(outcome.adapter)
    (outcome.adapter / "adapter_config.json").write_text("{}")
    assert not is_sealed(outcome.adapter)
    heard = []
    trainer.train(fresh(), job(), lambda step, total: heard.append(step))
    assert heard == []
    assert files_of(outcome.adapter) == before


def test_a_full_disk_is_named_and_leaves_no_half_checkpoint(fresh, job, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stillhouse.workers.checkpoints.save_file", full)
    with pytest.raises(StorageFullError, match="Free some space"):
        trainer.train(fresh(), job(), ignore)
    assert list((job().folder / "checkpoints").iterdir()) == []
