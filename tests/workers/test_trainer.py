import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from stillhouse.configs.stages import LoraConfig, TrainConfig
from stillhouse.errors import ConfigError, ModelError, SourceError, StorageFullError, TrainingError
from stillhouse.workers import trainer
from stillhouse.workers.adapter_training import adapter_parameters, put_adapter
from stillhouse.workers.folders import is_sealed
from stillhouse.workers.models.language_model import load
from stillhouse.workers.projection import TargetRow, target_logps
from stillhouse.workers.protocols import ModelSpec, Pair, ResponseLogp, TrainExample, TrainJob
from stillhouse.workers.schedule import epoch_batches, learning_rate
from stillhouse.workers.scorer import response_logps

CONFIG = TrainConfig(
    lora=LoraConfig(rank=2, alpha=4),
    learning_rate=1e-2,
    epochs=2,
    batch_size=3,
    max_tokens=48,
    checkpoint_steps=2,
    keep_checkpoints=2,
)
EXAMPLES = [
    TrainExample(f"e{index}", f"Q{'.' * (index * 5 % 7)} {index}:", f" A{index % 3}")
    for index in range(11)
]
TOTAL = 8  # 2 epochs of ceil(11 / 3) steps


def ignore(step, total):
    """Listen to nobody."""


class Killed(Exception):  # noqa: N818
    """Stands for a death between two steps."""


@pytest.fixture
def fresh(model_folders, store):
    """Loads a model of its own at each call: training wraps its layers."""

    def make(kind="llama"):
        return load(store, ModelSpec(str(model_folders[kind])))

    return make


@pytest.fixture
def job(model_folders, tmp_path):
    def make(folder="train", examples=EXAMPLES, kind="llama", **changes):
        config = CONFIG.model_copy(update=changes)
        return TrainJob(ModelSpec(str(model_folders[kind])), examples, config, tmp_path / folder)

    return make


def stop_after(last):
    def on_step(step, total):
        if step.step == last:
            raise Killed

    return on_step


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- what is learnt


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_the_first_loss_is_minus_the_mean_log_probability(fresh, job, kind):
    """The adapter starts as zero, so the base's scores give the loss; EOS is one more token."""
    lm = fresh(kind)
    whole = [TrainExample("e", "Q:", " A"), TrainExample("f", "Longer one:", " BCD")]
    sums, count = 0.0, 0
    for example in whole:
        prompt, response = lm.encode_prompt(example.prompt), lm.encode_response(example.response)
        (scored,) = response_logps(lm, [Pair(example.prompt, example.response)], 1)
        with torch.no_grad():
            logits_V = lm.model(torch.tensor([prompt + response])).logits[0, -1]
        eos = logits_V.log_softmax(-1)[lm.eos_ids[0]].item()
        sums, count = sums + sum(scored.logp) + eos, count + len(response) + 1
    outcome = trainer.train(lm, job(kind=kind, examples=whole, epochs=1), ignore)
    (step,) = outcome.steps
    assert step.loss == pytest.approx(-sums / count, rel=1e-5)
    assert (step.response_tokens, step.epoch, step.step) == (count, 0, 1)
    assert step.tokens == sum(outcome.tokens.values())


def test_training_lowers_the_loss_and_the_adapter_loads_with_peft(fresh, job, llama):
    outcome = trainer.train(fresh(), job(epochs=12), ignore)
    losses = [step.loss for step in outcome.steps]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    pairs = [Pair(example.prompt, example.response) for example in EXAMPLES]
    base = fresh()
    adapted = dataclasses.replace(
        base, model=PeftModel.from_pretrained(base.model, outcome.adapter).eval()
    )
    before = response_logps(llama, pairs, 4)
    after = response_logps(adapted, pairs, 4)
    for one, other in zip(before, after, strict=True):
        assert isinstance(one, ResponseLogp)
        assert isinstance(other, ResponseLogp)
        assert sum(other.logp) > sum(one.logp) + 1


def test_gradients_are_those_of_a_loss_over_all_logits(fresh):
    lm = fresh()
    adapted = put_adapter(lm.model, LoraConfig(rank=2), "ref", seed=1).double()
    lm = dataclasses.replace(lm, model=adapted)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter_parameters(adapted).values():
            parameter.normal_(std=0.1, generator=generator)
    rows = [TargetRow([5, 6, 7, 8, 9], 2), TargetRow([4, 3, 2], 1)]
    (-target_logps(lm, rows).mean()).backward()
    ours = {name: p.grad.clone() for name, p in adapter_parameters(adapted).items()}
    adapted.zero_grad()
    logps = []
    for row in rows:
        logp_TV = adapted(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        first = len(row.ids) - row.targets
        logps += [logp_TV[at - 1, row.ids[at]] for at in range(first, len(row.ids))]
    (-torch.stack(logps).mean()).backward()
    for name, parameter in adapter_parameters(adapted).items():
        torch.testing.assert_close(ours[name], parameter.grad)


def test_each_new_step_is_reported_with_the_number_of_all(fresh, job):
    heard = []
    outcome = trainer.train(fresh(), job(), lambda step, total: heard.append((step, total)))
    assert [step for step, _ in heard] == list(outcome.steps)
    assert {total for _, total in heard} == {TOTAL}
    assert [step.epoch for step in outcome.steps] == [0] * 4 + [1] * 4


def test_examples_that_cannot_be_learnt_are_named(fresh, job):
    odd = [TrainExample("long", "x" * 60, " y"), TrainExample("empty", "Q:", "")]
    odd += [TrainExample("bare", "", " y")]
    outcome = trainer.train(fresh(), job(examples=[*EXAMPLES, *odd]), ignore)
    assert outcome.rejected == {
        "long": "too_long",
        "empty": "empty_response",
        "bare": "empty_prompt",
    }
    assert set(outcome.tokens) == {example.example_id for example in [*EXAMPLES, *odd]}
    assert len(outcome.steps) == TOTAL


def test_no_example_left_is_refused(fresh, job):
    with pytest.raises(SourceError, match=r"at least one example.*empty_response"):
        trainer.train(fresh(), job(examples=[TrainExample("e", "Q", "")]), ignore)


def test_an_adapted_model_is_not_trained_again(fresh, job, tmp_path):
    spec = ModelSpec("ref", tmp_path)
    with pytest.raises(ModelError, match="export the adapted model first"):
        trainer.train(fresh(), dataclasses.replace(job(), model=spec), ignore)


# --- where the adapter sits


@pytest.mark.parametrize(("targets", "per_layer"), [("all_linear", 7), ("attention", 4)])
def test_targets_and_first_layer(fresh, targets, per_layer):
    lm = fresh()
    adapted = put_adapter(lm.model, LoraConfig(rank=2, targets=targets, first_layer=1), "r", 0)
    names = list(adapter_parameters(adapted))
    assert len(names) == 2 * per_layer * 2  # A and B in two of three layers
    assert not any("layers.0." in name for name in names)


def test_layers_below_the_first_keep_nothing_for_the_backward_pass(fresh):
    lm = fresh()
    adapted = put_adapter(lm.model, LoraConfig(rank=2, first_layer=2), "ref", 0)
    seen = []
    for layer in adapted.get_base_model().model.layers:
        layer.register_forward_hook(lambda *call: seen.append(call[-1].requires_grad))
    target_logps(dataclasses.replace(lm, model=adapted), [TargetRow([1, 2, 3], 1)])
    assert seen == [False, False, True]


def test_a_first_layer_beyond_the_model_is_refused(fresh):
    with pytest.raises(ConfigError, match="expected below 3"):
        put_adapter(fresh().model, LoraConfig(first_layer=3), "ref", 0)


def test_the_seed_decides_the_adapter_and_the_global_random_state_does_not(fresh):
    def first(seed, noise):
        torch.manual_seed(noise)
        adapted = put_adapter(fresh().model, LoraConfig(rank=2), "ref", seed)
        return [value for name, value in adapter_parameters(adapted).items() if "lora_A" in name]

    assert torch.equal(first(1, 0)[0], first(1, 7)[0])
    assert not torch.equal(first(1, 0)[0], first(2, 0)[0])
    same_shape = [value for value in first(1, 0) if value.shape == (2, 32)]
    assert not torch.equal(same_shape[0], same_shape[1])


# --- the schedule


def test_learning_rate_by_hand():
    rates = [learning_rate(step, 10, 1.0, 0.2) for step in range(1, 11)]
    assert rates == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_an_epoch_shows_every_example_once_in_batches_of_like_length():
    lengths = [index % 40 for index in range(103)]
    batches = epoch_batches(lengths, 4, seed=1, epoch=0)
    assert sorted(index for batch in batches for index in batch) == list(range(103))
    assert len(batches) == math.ceil(103 / 4)
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    assert padded < 1.25 * sum(lengths)
    assert batches == epoch_batches(lengths, 4, seed=1, epoch=0)
    assert batches != epoch_batches(lengths, 4, seed=1, epoch=1)
    assert batches != epoch_batches(lengths, 4, seed=2, epoch=0)


# --- resume


SCRIPT = """
import os, signal, sys, torch
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]) / "tests" / "workers")]
import stillhouse
from stillhouse.configs.stages import TrainConfig
from stillhouse.workers.local import LocalWorkers
from stillhouse.workers.projection import TargetRow, target_logps
from stillhouse.workers.protocols import ModelSpec, TrainExample, TrainJob
import json
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


@pytest.mark.parametrize("last", range(1, TOTAL + 1))
def test_stopped_after_any_step_and_resumed(fresh, job, last):
    clean = trainer.train(fresh(), job("clean", checkpoint_steps=1), ignore)
    broken = job("broken", checkpoint_steps=1)
    with pytest.raises(Killed):
        trainer.train(fresh(), broken, stop_after(last))
    resumed = trainer.train(fresh(), broken, ignore)
    assert resumed.steps == clean.steps
    assert files_of(resumed.adapter) == files_of(clean.adapter)


def test_a_torn_checkpoint_is_passed_over_for_the_one_before(fresh, job):
    clean = trainer.train(fresh(), job("clean"), ignore)
    broken = job("broken")
    with pytest.raises(Killed):
        trainer.train(fresh(), broken, stop_after(5))
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


def test_what_a_kill_left_of_a_half_written_checkpoint_is_no_checkpoint(fresh, job):
    clean = trainer.train(fresh(), job("clean"), ignore)
    broken = job("broken")
    with pytest.raises(Killed):
        trainer.train(fresh(), broken, stop_after(3))
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


def test_the_adapter_folder_names_the_base_and_no_machine(fresh, job, model_folders):
    outcome = trainer.train(
        fresh(), dataclasses.replace(job(), model=ModelSpec("hf:a/b@1")), ignore
    )
    config = json.loads((outcome.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "hf:a/b@1"
    assert config["target_modules"] == sorted(config["target_modules"])
    text = " ".join(data.decode("latin1") for data in files_of(outcome.adapter).values())
    assert str(model_folders["llama"]) not in text
    tensors = load_file(outcome.adapter / "adapter_model.safetensors")
    assert all(value.dtype == torch.float32 for value in tensors.values())


# --- what goes wrong


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_good_checkpoint(fresh, job):
    wild = job(learning_rate=1e30, checkpoint_steps=1, warmup_fraction=0.0)
    with pytest.raises(TrainingError) as caught:
        trainer.train(fresh(), wild, ignore)
    message = str(caught.value)
    assert "step 2 of 8" in message
    assert "nan" in message or "inf" in message
    assert "learning rate 8.75e+29" in message
    assert str(wild.folder / "checkpoints" / "step_1") in message
    assert "Try a lower learning_rate" in message
    assert is_sealed(wild.folder / "checkpoints" / "step_1")
    assert not (wild.folder / "adapter").exists()


def test_a_poisoned_weight_stops_at_the_first_step(fresh, job):
    lm = fresh()
    with torch.no_grad():
        lm.model.model.norm.weight[0] = math.nan
    with pytest.raises(TrainingError, match=r"step 1 of 8.*no checkpoint was written yet"):
        trainer.train(lm, job(), ignore)


def test_a_full_disk_is_named_and_leaves_no_half_checkpoint(fresh, job, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stillhouse.workers.checkpoints.save_file", full)
    with pytest.raises(StorageFullError, match="Free some space"):
        trainer.train(fresh(), job(), ignore)
    assert list((job().folder / "checkpoints").iterdir()) == []
