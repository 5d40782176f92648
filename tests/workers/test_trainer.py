"""What a training learns, what it reports, and what it refuses."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from stillhouse.configs.stages import DistillConfig, LoraConfig
from stillhouse.errors import ModelError, SourceError, TrainingError
from stillhouse.workers import trainer
from stillhouse.workers.adapter_training import adapter_parameters, put_adapter
from stillhouse.workers.folders import is_sealed
from stillhouse.workers.projection import TargetRow, target_logps
from stillhouse.workers.protocols import ModelSpec, Pair, ResponseLogp, TrainExample
from stillhouse.workers.scorer import response_logps
from tests.workers.small_training import CONFIG, EXAMPLES, TOTAL, ignore


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


@pytest.mark.parametrize(
    ("share", "kept"), [(0.5, [1, 2, 3]), (0.75, [1, 2, 3, 4, 5]), (1.0, [*range(6)])]
)
def test_the_loss_is_of_the_tokens_with_the_largest_excess(fresh, job, share, kept):
    """Six tokens in the target's cut, two in the other: the last five share the second's excess."""
    lm = fresh()
    example = TrainExample("e", "Q:", " A B C", token_ends=[1, 6], excess=[-1.0, 5.0])
    assert len(lm.encode_response(example.response)) == 6
    (scored,) = response_logps(lm, [Pair(example.prompt, example.response)], 1)
    ids = torch.tensor([lm.encode_prompt("Q:") + lm.encode_response(" A B C")])
    with torch.no_grad():
        eos = lm.model(ids).logits[0, -1].log_softmax(-1)[lm.eos_ids[0]].item()
    config = DistillConfig(**{**dict(CONFIG), "epochs": 1, "token_share": share})
    masked = dataclasses.replace(job(examples=[example], epochs=1), config=config)
    (step,) = trainer.train(lm, masked, ignore).steps
    expected = [*(scored.logp[place] for place in kept), eos]
    assert step.loss == pytest.approx(-sum(expected) / len(expected), rel=1e-5)
    assert step.response_tokens == len(expected)
    assert step.tokens == ids.shape[1] + 1


def test_a_mask_needs_to_know_where_tokens_end(fresh, job):
    example = TrainExample("e", "Q:", " A B C", token_ends=[], excess=[1.0, 2.0])
    config = DistillConfig(**{**dict(CONFIG), "epochs": 1, "token_share": 0.5})
    with pytest.raises(ModelError, match=r"distill\.token_share: expected tokenizers that say"):
        trainer.train(fresh(), dataclasses.replace(job(examples=[example]), config=config), ignore)


def test_an_excess_that_nobody_measured_masks_nothing(fresh, job):
    config = DistillConfig(**{**dict(CONFIG), "epochs": 1, "token_share": 0.1})
    plain = job(examples=EXAMPLES, epochs=1)
    outcome = trainer.train(fresh(), dataclasses.replace(plain, config=config), ignore)
    assert sum(step.response_tokens for step in outcome.steps) > 2 * len(EXAMPLES)


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


def test_two_steps_are_those_of_adamw_by_hand(fresh, job):
    """Decay, clipping, schedule and alpha, each far from its default, against the formulas."""
    lora = LoraConfig(rank=2, alpha=7)
    twice = [TrainExample(name, "Q: 3", " A1") for name in "ab"]  # equal: their order is no matter
    changes: dict[str, Any] = {"lora": lora, "weight_decay": 0.3, "max_gradient_norm": 1e-3}
    changes |= {"epochs": 1, "batch_size": 1, "warmup_fraction": 0.0, "learning_rate": 0.02}
    config = job(**changes).config
    outcome = trainer.train(fresh(), job(examples=twice, **changes), ignore)
    assert [step.learning_rate for step in outcome.steps] == [0.02, 0.01]

    lm = fresh()
    model: Any = put_adapter(lm.model, lora, "ref", seed=config.seed)
    parameters = adapter_parameters(model)
    prompt, response = lm.encode_prompt("Q: 3"), lm.encode_response(" A1")
    ids = [*prompt, *response, lm.eos_ids[0]]
    targets = torch.tensor(ids[len(prompt) :])[:, None]
    first: dict[str, Any] = dict.fromkeys(parameters, 0.0)
    second: dict[str, Any] = dict.fromkeys(parameters, 0.0)
    for number, rate in ((1, 0.02), (2, 0.01)):
        model.zero_grad()
        logp = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        (-logp.gather(1, targets).mean()).backward()
        gradients: dict[str, Any] = {name: p.grad for name, p in parameters.items()}
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        assert outcome.steps[number - 1].gradient_norm == pytest.approx(norm, rel=1e-3)
        for name, parameter in parameters.items():
            clipped = gradients[name] * 1e-3 / (norm + 1e-6)
            first[name] = 0.9 * first[name] + 0.1 * clipped
            second[name] = 0.999 * second[name] + 0.001 * clipped.square()
            root = (second[name] / (1 - 0.999**number)).sqrt() + 1e-8
            step = first[name] / (1 - 0.9**number) / root
            with torch.no_grad():
                parameter.mul_(1 - rate * 0.3).sub_(rate * step)
    made = load_file(outcome.adapter / "adapter_model.safetensors")
    assert len(made) == len(parameters)
    for name, parameter in parameters.items():
        torch.testing.assert_close(
            made[name.replace(".default", "")], parameter.detach(), rtol=1e-2, atol=1e-5
        )
    assert json.loads((outcome.adapter / "adapter_config.json").read_text())["lora_alpha"] == 7
