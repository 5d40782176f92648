"""Maps of values in the weights: the model says the same, the cache holds the same."""

import copy
import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stillhouse.configs.stages import CompressConfig
from stillhouse.workers.cache import CachePlan
from stillhouse.workers.calibrator import calibrate
from stillhouse.workers.divergence import compressed_cache_factory, measure_cache
from stillhouse.workers.exporter import export
from stillhouse.workers.folding import fold_values
from stillhouse.workers.models.language_model import load
from stillhouse.workers.protocols import ExportJob, ModelSpec

TEXTS = [f"Sentence {n} of a corpus, which has {n * n} words in it." for n in range(12)]
CONFIG = CompressConfig(sinks=2)


def plan_for(lm, bits=3.0):
    rows = [lm.encode_prompt(text) for text in TEXTS]
    return calibrate(lm, rows, sinks=2, recent=0, context=64).plan_of_bits(bits)


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


def test_the_model_says_the_same_and_the_plan_has_no_map_for_values(lm):
    plan = plan_for(lm)
    model = copy.deepcopy(lm.model)
    folded = fold_values(model, plan)
    ids = torch.randint(3, 200, (2, 30), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(model, ids), logits(lm.model, ids), atol=2e-4, rtol=2e-4)
    assert folded.facts["values_folded"] == 3
    assert not torch.equal(
        model.model.layers[0].self_attn.v_proj.weight,
        lm.model.model.layers[0].self_attn.v_proj.weight,
    )
    for layer, before in zip(folded.layers, plan.layers, strict=True):
        assert layer.value.map_HDD is None
        assert layer.value.inverse_HDD is None
        assert layer.key is before.key
        assert layer.value.nbytes < before.value.nbytes


def test_values_are_stored_as_before(lm, tmp_path):
    plan = plan_for(lm)
    model = copy.deepcopy(lm.model)
    fold_values(model, plan).save(tmp_path / "folded")
    plan.save(tmp_path / "plan")
    other = dataclasses.replace(lm, model=model)
    before, size = measure_cache(lm, TEXTS[:3], CONFIG, tmp_path / "plan")
    after, folded_size = measure_cache(other, TEXTS[:3], CONFIG, tmp_path / "folded")
    for one, two in zip(before, after, strict=True):
        assert one.kl_mean > 1e-4
        assert two.kl_mean == pytest.approx(one.kl_mean, rel=0.02)  # ties and roundings
    assert folded_size.bytes_per_token == size.bytes_per_token
    assert folded_size.table_bytes < 0.75 * size.table_bytes


def test_a_bias_and_query_groups_are_folded_too(lm):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=300, attention_bias=True,
        initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    biased = dataclasses.replace(lm, model=model)
    plan = plan_for(biased)
    ids = torch.arange(3, 30)[None]
    before = logits(model, ids)
    assert fold_values(model, plan).facts["values_folded"] == 1
    torch.testing.assert_close(logits(model, ids), before, atol=2e-4, rtol=2e-4)


def test_attention_that_does_more_than_sum_values_is_left_alone(fresh):
    lm = fresh()
    plan = plan_for(lm)
    for layer in lm.model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda _module, _given, value: value.tanh())
    weights = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    same = fold_values(lm.model, plan)
    assert same.facts["values_folded"] == 0
    assert same.layers == plan.layers
    assert all(torch.equal(tensor, weights[name]) for name, tensor in lm.model.state_dict().items())


def test_layers_that_are_not_found_keep_their_maps(fresh):
    lm = fresh()
    plan = plan_for(lm)
    lm.model.model.layers[1].self_attn.o_proj = torch.nn.Sequential(
        lm.model.model.layers[1].self_attn.o_proj
    )
    folded = fold_values(lm.model, plan)
    assert folded.facts["values_folded"] == 2
    assert [layer.value.map_HDD is None for layer in folded.layers] == [True, False, True]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_exported_folder_is_served_with_its_own_plan(lm, fresh, store, tmp_path, dtype):
    kind = "llama" if lm.bos is None else "gemma"
    plan_for(lm).save(tmp_path / "plan")
    job = ExportJob(ModelSpec("any"), tmp_path / "out", dtype, {}, tmp_path / "plan")
    export(fresh(kind), job)
    made = load(store, ModelSpec(str(tmp_path / "out")))
    assert CachePlan.load(tmp_path / "out" / "cache").facts["values_folded"] == 3
    before, _ = measure_cache(lm, TEXTS[:3], CONFIG, tmp_path / "plan")
    after, _ = measure_cache(made, TEXTS[:3], CONFIG, tmp_path / "out" / "cache")
    for one, two in zip(before, after, strict=True):
        assert two.kl_mean == pytest.approx(one.kl_mean, rel=0.05 if dtype == "float32" else 0.5)
    cache = compressed_cache_factory(made, CONFIG, tmp_path / "out" / "cache")()
    assert cache.nbytes == 0
