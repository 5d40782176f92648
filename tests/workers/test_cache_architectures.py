"""The packed cache, its calibration and its folding on decoders of other families."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from stillhouse.configs.stages import CompressConfig
from stillhouse.kernels.turboquant import HalfCodec
from stillhouse.workers.cache import FittedScheme, SameCodecScheme, TurboQuantCache
from stillhouse.workers.calibrator import calibrate
from stillhouse.workers.divergence import cache_factory, measure_texts, oblivious_scheme
from stillhouse.workers.folding import fold_values
from stillhouse.workers.protocols import CacheMeasure
from tests.workers.cache_models import step_logits

FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 12}),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {}),
    "phi": (PhiConfig, PhiForCausalLM, {"partial_rotary_factor": 0.5}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {"sliding_window": 12}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
}
FOLDED = {"mistral": 2, "olmo2": 2, "phi": 2, "phi3": 2, "qwen2": 2, "qwen3": 2}
TEXTS = [f"Sentence {n} of a corpus, which has {n * n} words in it." for n in range(20)]
HELDOUT = [f"Another text, number {n}, that was not used before." for n in range(4)]


@pytest.fixture(params=list(FAMILIES))
def family(request):
    return request.param


@pytest.fixture
def other(family, llama):
    """A random model of the family behind the byte tokenizer."""
    config, kind, more = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "vocab_size": 259, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
        }  # fmt: skip
        model = kind(config(**sizes, **more)).eval().requires_grad_(False)
    model.lm_head.bias = None  # phi has one, for which our projection refuses it
    return dataclasses.replace(llama, model=model)


def test_a_cache_that_packs_nothing_changes_nothing(other):
    model = other.model
    ids = torch.randint(3, 250, (2, 30), generator=torch.Generator().manual_seed(0))
    scheme = SameCodecScheme(lambda dim, _kind, _device: HalfCodec(dim))
    found = step_logits(model, ids, TurboQuantCache(model.config, scheme), (20, 1, 9))
    plain = step_logits(model, ids, DynamicCache(config=model.config), (20, 1, 9))
    assert (found - plain).abs().max() < 0.02 * plain.abs().max()
    packed = TurboQuantCache(model.config)
    coded = step_logits(model, ids, packed, (20, 1, 9))
    assert 0 < (coded - plain).abs().mean() < plain.abs().mean()
    assert packed.nbytes < 0.5 * 2 * 2 * 2 * 2 * 30 * 16 * 2 + packed.table_nbytes


def test_a_fitted_cache_loses_less_and_folds_where_it_can(other, family):
    plan = calibrate(other, [other.encode_prompt(text) for text in TEXTS], sinks=2, recent=0, context=64)
    fitted = FittedScheme(plan.plan_of_bits(2))
    config = CompressConfig(key_bits=2, value_bits=2, sinks=2)
    losses = []
    for scheme in (fitted, oblivious_scheme(config)):
        measures, _ = measure_texts(other, HELDOUT, cache_factory(other, scheme))
        losses.append(sum(m.kl_mean for m in measures if isinstance(m, CacheMeasure)))
    assert losses[0] < 0.8 * losses[1]
    model = copy.deepcopy(other.model)
    assert fold_values(model, fitted.plan).facts["values_folded"] == FOLDED[family]
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(model(ids).logits, other.model(ids).logits, atol=1e-3, rtol=1e-3)
