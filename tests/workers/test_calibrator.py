"""Calibration: plans of a budget, saved and loaded, and what they are worth on models."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.configs.stages import CompressConfig
from stillhouse.errors import ModelError
from stillhouse.kernels.paged_attention.gpu_refusals import require_codec
from stillhouse.kernels.paged_attention.gpu_store import StoreTables
from stillhouse.kernels.turboquant import ChannelGroup, HeadFit
from stillhouse.workers.cache import (
    CACHE_KINDS,
    CacheFormat,
    CachePlan,
    FittedScheme,
    LayerPlan,
    ObliviousScheme,
    TurboQuantCache,
)
from stillhouse.workers.calibrator import Calibration, calibrate, write_plan
from stillhouse.workers.divergence import compressed_cache_factory, measure_cache
from stillhouse.workers.models.language_model import LanguageModel
from stillhouse.workers.projection import core
from stillhouse.workers.protocols import CacheMeasure, CalibrateJob, ModelSpec
from tests.workers import cache_models
from tests.workers.cache_models import HEAD_DIM, HEADS, random_kv, tokens

TEXTS = [f"Sentence {n} of a corpus, which has {n * n} words in it." for n in range(30)]
HELDOUT = [f"Another text, number {n}, that was not used before." for n in range(6)]


@pytest.fixture
def calibration(lm: LanguageModel) -> Calibration:
    return calibrate(lm, [lm.encode_prompt(text) for text in TEXTS], sinks=2, recent=0, context=64)


def kl(lm: LanguageModel, config: CompressConfig, plan: Path | None = None) -> float:
    measures, _ = measure_cache(lm, HELDOUT, config, plan)
    found = [measure for measure in measures if isinstance(measure, CacheMeasure)]
    assert len(found) == len(HELDOUT)
    return sum(m.kl_mean * m.tokens for m in found) / sum(m.tokens for m in found)


@pytest.mark.parametrize("bits", [2, 2.5, 3, 4])
def test_a_plan_keeps_to_its_bits_and_uses_them(calibration: Calibration, bits: float) -> None:
    plan = calibration.plan_of_bits(bits)
    assert plan.facts["bits_per_coordinate"] <= bits
    assert plan.facts["bits_per_coordinate"] > bits - 0.25
    assert plan.facts["calibration_tokens"] == calibration.tokens


def one_group(llama: LanguageModel, head_dim: int) -> Calibration:
    model: Any = cache_models.llama(head_dim).requires_grad_(False)
    rows = [tokens(1, 40, seed)[0].tolist() for seed in range(3)]
    lm = dataclasses.replace(llama, model=model)
    return calibrate(lm, rows, sinks=2, recent=3, context=40, groups=1)


def test_one_channel_group_is_what_the_kernels_of_a_gpu_read(llama: LanguageModel) -> None:
    calibration = one_group(llama, 80)
    for bits in (1.75, 2.5, 3, 4, 5):
        plan = calibration.plan_of_bits(bits)
        assert plan.facts["bits_per_coordinate"] <= bits
        scheme = FittedScheme(plan)
        sample = torch.zeros(1, HEADS, 1, 80)
        codecs: list[Any] = [
            scheme.codec(layer, kind, sample) for layer in range(2) for kind in CACHE_KINDS
        ]
        assert {require_codec(codec).channels for codec in codecs} <= {64, 80}
        assert all(StoreTables.of(codec, "cpu").heads == HEADS for codec in codecs)
    with pytest.raises(ModelError, match=r"expected 1\.6 bits a coordinate or more"):
        calibration.plan_of_bits(1.5)


def test_one_channel_group_of_small_heads_is_refused(llama: LanguageModel) -> None:
    with pytest.raises(ModelError, match=r"compress\.channel_groups: expected a head size of 64"):
        one_group(llama, 16)


def test_more_bits_cost_less(calibration: Calibration) -> None:
    plans = [calibration.plan_of_bits(bits) for bits in (1.5, 2, 3, 4, 5)]
    costs = [plan.facts["expected_kl"] for plan in plans]
    assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize("context", [4, 40, 400])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_fitted_cache_takes_the_bytes_of_an_oblivious_one_at_its_context(
    gemma: LanguageModel, bits: int, context: int
) -> None:
    """Also where some layers slide and keep but a window of the tokens."""
    rows = [gemma.encode_prompt(text) for text in TEXTS]
    plan = calibrate(gemma, rows, sinks=0, recent=0, context=context).plan_of_bits(bits)
    config = core(gemma).config
    sizes = []
    for scheme in (FittedScheme(plan), ObliviousScheme(CacheFormat(bits, bits))):
        cache = TurboQuantCache(config, scheme)
        for layer in range(config.num_hidden_layers):
            cache.update(*random_kv(1, context), layer)
        sizes.append(cache.nbytes - cache.table_nbytes)
    assert 0.85 * sizes[1] < sizes[0] <= sizes[1]


@pytest.mark.parametrize("bits", [2, 3, 4.5])
def test_even_layers_share_their_own_bytes(calibration: Calibration, bits: float) -> None:
    def bits_of(fit: HeadFit | None) -> int:
        assert fit is not None
        return sum(group.channels * group.bits for group in fit.groups)

    plan = calibration.plan_of_bits(bits, even=True)
    free = calibration.plan_of_bits(bits)
    dim = plan.layers[0].key.mean_HD.shape[-1]
    for layer in plan.layers:
        stored = bits_of(layer.key) + bits_of(layer.value)
        assert 2 * dim * bits - 16 <= stored <= 2 * dim * bits  # groups are of 8 channels
    assert free.facts["expected_kl"] <= plan.facts["expected_kl"] + 1e-12


def test_a_fitted_cache_loses_less_than_an_oblivious_one(lm: LanguageModel, tmp_path: Path) -> None:
    config = CompressConfig(key_bits=2, value_bits=2, sinks=2, calibration_tokens=2000)
    job = CalibrateJob(ModelSpec("any"), TEXTS, config, tmp_path)
    read = write_plan(lm, job, lambda _text: None)
    assert 2000 <= read < 2000 + 2 * lm.context
    assert kl(lm, config, tmp_path) < 0.6 * kl(lm, config)


def test_a_large_key_bias_breaks_the_oblivious_codec_and_not_the_fitted(
    llama: LanguageModel, tmp_path: Path
) -> None:
    """As in Qwen2: keys share a vector far longer than what tells them apart."""
    biased = with_key_offset(llama, 40.0)
    config = CompressConfig(key_bits=4, value_bits=4, sinks=2, calibration_tokens=2000)
    write_plan(biased, CalibrateJob(ModelSpec("any"), TEXTS, config, tmp_path), lambda _text: None)
    max_kl = 0.2
    assert kl(biased, config) > 5 * max_kl
    assert kl(biased, config, tmp_path) < max_kl / 2


def with_key_offset(lm: LanguageModel, length: float) -> LanguageModel:
    """With biased key projections, in the channels that rotate slowest, where Qwen2 has them."""
    model: Any = copy.deepcopy(lm.model)
    half = model.config.head_dim // 2
    for layer in model.model.layers:
        projection = layer.self_attn.k_proj
        bias = torch.zeros(projection.out_features)
        bias[half - 1 :: half] = length
        projection.bias = torch.nn.Parameter(bias, requires_grad=False)
    return dataclasses.replace(lm, model=model)


def test_a_saved_plan_codes_the_same(calibration: Calibration, tmp_path: Path) -> None:
    plan = calibration.plan_of_bits(3)
    kept = LayerPlan(plan.layers[0].key, None)
    plan = CachePlan((kept, *plan.layers[1:]), 3, 5, plan.facts)
    files = plan.save(tmp_path)
    assert [file.name for file in files] == ["cache_plan.safetensors", "cache_plan.json"]
    loaded = CachePlan.load(tmp_path)
    assert (loaded.sinks, loaded.recent, dict(loaded.facts)) == (3, 5, dict(plan.facts))
    assert loaded.layers[0].value is None
    before = [file.read_bytes() for file in files]
    loaded.save(tmp_path)
    assert [file.read_bytes() for file in files] == before
    heads, dim = plan.layers[1].value.mean_HD.shape if plan.layers[1].value else (0, 0)
    x = torch.randn(2, heads, 7, dim, generator=torch.Generator().manual_seed(0))
    one, two = (FittedScheme(each).codec(1, "value", x) for each in (plan, loaded))
    assert torch.equal(one.encode(x).indices, two.encode(x).indices)
    torch.testing.assert_close(one.decode(one.encode(x)), two.decode(two.encode(x)))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"version": 99}, "expected version 2, found 99; calibrate again"),
        ({"tensors": {"file": "cache_plan.safetensors", "sha256": "0"}}, "expected sha256 0"),
        ({"groups": [{"key": [[8, 2]]}]}, "groups of cache_plan.json is not that of"),
        ({"sinks": 5}, "sinks of cache_plan.json is not that of"),
    ],
)
def test_a_plan_that_is_not_whole_is_refused(
    calibration: Calibration, tmp_path: Path, change: dict[str, Any], match: str
) -> None:
    _, path = calibration.plan_of_bits(3).save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=match):
        CachePlan.load(tmp_path)


@pytest.mark.parametrize(
    "groups", [[(12, 3), (4, 2)], [(8, 0), (8, 3)], [(8, 7), (8, 3)], [(8, 3)], [(24, 3)]]
)
def test_groups_that_no_codec_has_are_refused(
    calibration: Calibration, tmp_path: Path, groups: list[tuple[int, int]]
) -> None:
    plan = calibration.plan_of_bits(3)
    key = plan.layers[0].key
    assert key is not None
    wrong = dataclasses.replace(key, groups=tuple(ChannelGroup(*group) for group in groups))
    CachePlan((LayerPlan(wrong, None), *plan.layers[1:]), 0, 0).save(tmp_path)
    with pytest.raises(ModelError, match="groups of layer 0's keys do not fit 16 channels"):
        CachePlan.load(tmp_path)


def test_no_plan_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected a cache plan"):
        CachePlan.load(tmp_path)


def test_a_plan_of_another_model_is_refused(calibration: Calibration) -> None:
    scheme = FittedScheme(calibration.plan_of_bits(3))
    with pytest.raises(ValueError, match="calibrate for this model"):
        scheme.codec(0, "key", torch.zeros(1, HEADS + 5, 1, HEAD_DIM))
    with pytest.raises(ValueError, match="calibrate for this model"):
        scheme.codec(99, "key", random_kv(1, 1)[0])


def test_generation_reads_the_plan(lm: LanguageModel, tmp_path: Path) -> None:
    config = CompressConfig(key_bits=3, value_bits=3)
    write_plan(lm, CalibrateJob(ModelSpec("any"), TEXTS, config, tmp_path), lambda _text: None)
    cache = compressed_cache_factory(lm, config, tmp_path)([0, 3])
    assert isinstance(cache, TurboQuantCache)
    assert isinstance(cache.scheme, FittedScheme)
    assert (cache.scheme.sinks, cache.scheme.recent) == (4, 0)


def test_a_quality_budget_takes_the_fewest_bits(llama: LanguageModel, tmp_path: Path) -> None:
    generous, strict = (
        CompressConfig(sinks=2, calibration_tokens=600, texts=6, budget_kl=budget)
        for budget in (0.5, 0.05)
    )
    bits = []
    for config in (generous, strict):
        heard: list[str] = []
        write_plan(llama, CalibrateJob(ModelSpec("any"), TEXTS, config, tmp_path), heard.append)
        plan = CachePlan.load(tmp_path)
        assert config.budget_kl is not None
        assert plan.facts["measured_kl"] <= config.budget_kl == plan.facts["budget_kl"]
        assert len(heard) <= 1 + 6  # one line of the fit, then a bisection of 17
        bits.append(plan.facts["bits_per_coordinate"])
        cheaper = [line for line in heard if f"{bits[-1] - 0.25:g} bits" in line]
        assert all(float(line.split()[4]) > config.budget_kl for line in cheaper)
    assert bits[0] < bits[1]


def test_a_budget_that_no_bits_meet_is_refused(llama: LanguageModel, tmp_path: Path) -> None:
    config = CompressConfig(sinks=2, calibration_tokens=600, texts=4, budget_kl=1e-9)
    with pytest.raises(ModelError, match=r"compress\.budget_kl: expected a cache that costs at"):
        write_plan(llama, CalibrateJob(ModelSpec("any"), TEXTS, config, tmp_path), lambda _: None)
    assert list(tmp_path.iterdir()) == []
