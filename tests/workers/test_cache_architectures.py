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
from stillhouse.workers.batching import pad_right
from stillhouse.workers.cache import FittedScheme, SameCodecScheme, TurboQuantCache
from stillhouse.workers.cache_quality.needle import Haystack, retrieved
from stillhouse.workers.cache_quality.tally import Tally, compare
from stillhouse.workers.calibrator import calibrate
from stillhouse.workers.divergence import cache_factory, measure_texts, oblivious_scheme
from stillhouse.workers.folding import fold_values
from stillhouse.workers.moments import stream_moments
from stillhouse.workers.projection import TargetRow, hidden_states, target_logps
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
HALF = SameCodecScheme(lambda dim, _kind, _device: HalfCodec(dim))
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
        if model.lm_head.bias is not None:  # phi's; zeros would hide its loss
            model.lm_head.bias.normal_()
    return dataclasses.replace(llama, model=model)


def test_a_cache_that_packs_nothing_changes_nothing(other):
    model = other.model
    ids = torch.randint(3, 250, (2, 30), generator=torch.Generator().manual_seed(0))
    found = step_logits(model, ids, TurboQuantCache(model.config, HALF), (20, 1, 9))
    plain = step_logits(model, ids, DynamicCache(config=model.config), (20, 1, 9))
    assert (found - plain).abs().max() < 0.02 * plain.abs().max()
    packed = TurboQuantCache(model.config)
    coded = step_logits(model, ids, packed, (20, 1, 9))
    assert 0 < (coded - plain).abs().mean() < plain.abs().mean()
    assert packed.nbytes < 0.5 * 2 * 2 * 2 * 2 * 30 * 16 * 2 + packed.table_nbytes


def test_a_fitted_cache_loses_less_and_folds_where_it_can(other, family):
    plan = calibrate(
        other, [other.encode_prompt(text) for text in TEXTS], sinks=2, recent=0, context=64
    )
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


@torch.no_grad()
def test_log_probabilities_are_the_models_own(other):
    ids = other.encode_prompt(HELDOUT[0])
    targets = torch.tensor(ids[1:])
    logp_TV = other.model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    wanted_T = logp_TV.gather(1, targets[:, None])[:, 0]
    found_T = target_logps(other, [TargetRow(ids, len(ids) - 1)])
    torch.testing.assert_close(found_T.double(), wanted_T, atol=1e-4, rtol=1e-5)
    [measure], _ = measure_texts(other, HELDOUT[:1], cache_factory(other, HALF))
    assert isinstance(measure, CacheMeasure)
    assert measure.logp_full == pytest.approx(float(wanted_T.sum()), abs=1e-3)
    hidden_TD = hidden_states(other, pad_right([ids[:-1]], other.pad, other.model.device))[0]
    tally = Tally()
    logp = compare(other, hidden_TD, {"same": hidden_TD}, targets, {"same": tally})
    assert logp == pytest.approx(float(wanted_T.sum()), abs=1e-3)
    assert tally.logp == pytest.approx(logp)


@torch.no_grad()
def test_what_is_retrieved_is_what_greedy_generation_writes(other):
    ids = other.encode_prompt(HELDOUT[1])
    start = len(ids)
    for _ in range(6):
        ids = [*ids, int(other.model(torch.tensor([ids])).logits[0, -1].argmax())]
    answers = [slice(start, start + 3), slice(start + 3, start + 6)]
    cache = DynamicCache(config=other.model.config)
    assert retrieved(other, Haystack(ids, answers), cache) == [True, True]
    ids[-1] = ids[-1] - 1 if ids[-1] else 1
    cache = DynamicCache(config=other.model.config)
    assert retrieved(other, Haystack(ids, answers), cache) == [True, False]


def test_where_the_heads_bias_decides_every_word_nothing_is_sensitive(other):
    rows = [other.encode_prompt(text) for text in TEXTS[:2]]
    before = stream_moments(other, rows, 0)[0].value.fisher().abs().max()
    bias = torch.zeros(other.model.lm_head.out_features)
    bias[7] = 100.0
    other.model.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    after = stream_moments(other, rows, 0)[0].value.fisher().abs().max()
    assert float(after) < 1e-9 < 1e-6 < float(before)
