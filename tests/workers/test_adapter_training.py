"""Where a fresh adapter sits, what it starts from, and what its folder holds."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, GPTNeoXConfig

from stillhouse.configs.stages import LoraConfig
from stillhouse.errors import ConfigError
from stillhouse.workers import trainer
from stillhouse.workers.adapter_training import adapter_parameters, put_adapter
from stillhouse.workers.projection import TargetRow, target_logps
from stillhouse.workers.protocols import ModelSpec
from tests.workers.small_training import files_of, ignore


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


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(n_layer=1, n_head=2, hidden_size=8, vocab_size=16),
        FalconConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=8, vocab_size=16),
        GPTNeoXConfig(
            num_hidden_layers=1,
            num_attention_heads=2,
            hidden_size=8,
            intermediate_size=8,
            vocab_size=16,
        ),
    ],
    ids=["bloom", "falcon", "gpt_neox"],
)
def test_attention_is_found_under_other_names(config):
    model = AutoModelForCausalLM.from_config(config)
    adapted = put_adapter(model, LoraConfig(rank=2, targets="attention"), "ref", seed=0)
    assert {name.split(".")[-4] for name in adapter_parameters(adapted)} == {
        "query_key_value",
        "dense",
    }
