"""Bytes of a cache: by hand, and against what the caches allocate."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from stillhouse.errors import ConfigError, ModelError
from stillhouse.kernels.turboquant import SUPPORTED_BITS, MseCodec
from stillhouse.workers.cache import (
    CACHE_KINDS,
    CacheFormat,
    FittedScheme,
    ObliviousScheme,
    TurboQuantCache,
    VllmScheme,
)
from stillhouse.workers.cache_quality.caches import CacheSource
from stillhouse.workers.cache_quality.formats import parse_format
from stillhouse.workers.calibrator import calibrate
from stillhouse.workers.models.cache_shape import CacheShape, LayerShape, cache_shape
from stillhouse.workers.models.cache_size import cache_size, stored_format, value_maps
from stillhouse.workers.projection import core
from tests.workers.cache_models import gemma, llama, random_kv, step_logits, tokens

LLAMA_70B = {
    "model_type": "llama",
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "hidden_size": 8192,
}
LLAMA_8B = LLAMA_70B | {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096}
GEMMA_270M = {
    "model_type": "gemma3_text",
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "sliding_window": 512,
}


def size(config, form, context, **options):
    return cache_size(cache_shape(config, "model"), stored_format(form), context, **options)


def test_llama_70b_at_128k_is_40_gib():
    """16 bits; a figure of 21.5 GB in print is that of 8 bits."""
    total = size(LLAMA_70B, "bf16", 131_072).total
    assert total == 40 * 2**30
    assert round(total / 1e9, 1) == 42.9
    assert round(size(LLAMA_70B, "fp8", 131_072).total / 1e9, 1) == 21.5


def test_llama_8b_at_128k_is_16_gib():
    assert size(LLAMA_8B, "bf16", 131_072).total == 16 * 2**30
    assert size(LLAMA_8B, "bf16", 131_072, batch=3).total == 48 * 2**30


def test_smollm2_is_23_040_bytes_a_token():
    config = {"num_hidden_layers": 30, "num_key_value_heads": 3, "head_dim": 64}
    assert size(config, "bf16", 1).total == 30 * 3 * 64 * 2 * 2 == 23_040


def test_gemma_270m_by_hand():
    """3 layers see everything, 15 hold 511 tokens; one head of 256."""
    held = 3 * 32_768 + 15 * 511
    assert size(GEMMA_270M, "bf16", 32_768).total == held * 256 * 2 * 2 == 108_512_256
    tables = 2 * 4 * (256 * 256 + 256 + 16 + 15)
    assert size(GEMMA_270M, "k4v4", 32_768).total == held * 2 * (128 + 2) + tables
    assert size(GEMMA_270M, "bf16", 100).total == 18 * 100 * 1024


@pytest.mark.parametrize(
    ("form", "at_128", "at_64"),
    [
        ("bf16", 512, 256),
        ("fp8", 256, 128),
        ("k4v4", 132, 68),
        ("k4v3", 116, 60),
        ("k3v3", 100, 52),
        ("k3v2", 84, 44),
        ("k2v2", 68, 36),
        ("vllm:k8v4", 196, 100),
        ("vllm:4bit_nc", 134, 70),
        ("vllm:k3v4_nc", 118, 62),
        ("vllm:3bit_nc", 102, 54),
        ("vllm:3bit_nc:all", 102, 54),
        ("mse:4", 132, 68),
        ("mse:3.5", 2 * (56 + 4), 2 * (28 + 4)),
        ("fitted:3", 100, 52),
        ("fitted:2.75", 2 * (44 + 2), 2 * (22 + 2)),
    ],
)
def test_bytes_of_a_token_and_head(form, at_128, at_64):
    for dim, expected in ((128, at_128), (64, at_64)):
        found = stored_format(form)
        assert found.key.nbytes(dim) + found.value.nbytes(dim) == expected


def test_vllm_keeps_two_layers_at_each_end():
    found = size(LLAMA_70B, "vllm:4bit_nc", 10)
    assert (found.stored, found.kept, found.tables) == (76 * 8 * 134 * 10, 4 * 8 * 512 * 10, 0)
    everywhere = size(LLAMA_70B, "vllm:4bit_nc:all", 10)
    assert (everywhere.stored, everywhere.kept) == (80 * 8 * 134 * 10, 0)


@pytest.mark.parametrize(("layers", "exact"), [(1, 0), (2, 2), (3, 2), (4, 4), (5, 4)])
def test_vllm_keeps_no_more_than_half_the_layers_at_an_end(layers, exact):
    found = size(LLAMA_70B | {"num_hidden_layers": layers}, "vllm:4bit_nc", 1)
    assert (found.stored, found.kept) == ((layers - exact) * 8 * 134, exact * 8 * 512)
    scheme, sample = VllmScheme("4bit_nc", layers), torch.zeros(1, 8, 1, 128)
    codecs = [scheme.codec(layer, "key", sample) for layer in range(layers)]
    assert sum(codec.bytes_per_vector == 256 for codec in codecs) == exact


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("dim", [16, 80, 128])
def test_the_rule_is_the_codecs(bits, dim):
    codec = MseCodec(dim, bits, "norm")
    form = stored_format(f"k{bits}v{bits}")
    assert form.key.nbytes(dim) == codec.bytes_per_vector
    shape = CacheShape("model", (LayerShape(1, dim, dim, None),), None)
    assert cache_size(shape, form, 1).tables == 2 * codec.nbytes


@pytest.mark.parametrize("model", [llama(), gemma()], ids=["llama", "gemma"])
@pytest.mark.parametrize("length", [1, 7, 8, 20])
@pytest.mark.parametrize("bits", [(4, 4), (3, 5), (8, 1)])
def test_a_plan_is_what_the_compressed_cache_allocates(model, length, bits):
    form = CacheFormat(key_bits=bits[0], value_bits=bits[1])
    cache = TurboQuantCache(model.config, ObliviousScheme(form))
    pieces = [length] if length < 3 else [length - 2, 1, 1]
    step_logits(model, tokens(3, length), cache, pieces)
    planned = size(model.config.to_dict(), f"k{bits[0]}v{bits[1]}", length, batch=3)
    assert planned.stored == cache.nbytes - cache.table_nbytes
    assert planned.tables == own_tables(ObliviousScheme(form), model.config)


def own_tables(scheme, config):
    """Bytes of tables of codecs that have not run: compiled loops lay some out anew."""
    sample = torch.zeros(1, config.num_key_value_heads, 1, config.head_dim)
    layers = range(config.num_hidden_layers)
    codecs = {scheme.codec(layer, kind, sample) for layer in layers for kind in CACHE_KINDS}
    return sum(codec.nbytes for codec in codecs)


@pytest.mark.parametrize("model", [llama(), gemma()], ids=["llama", "gemma"])
def test_a_plan_is_what_the_16_bit_cache_allocates(model):
    cache = DynamicCache(config=model.config)
    step_logits(model.to(torch.bfloat16), tokens(2, 20), cache, [12, 1, 7])
    held = 0
    for layer in cache.layers:
        held += 2 * (layer.keys.numel() + layer.values.numel())
    assert size(model.config.to_dict(), "bf16", 20, batch=2).total == held


NAMES = ["bf16", "fp8", "k3v5", "mse:4", "mse:1.5", "mse:4.5", "vllm:k8v4", "vllm:3bit_nc:all"]


def wide_gemma():
    """Three layers, and heads that a split of channels takes."""
    config = gemma().config
    config.head_dim = 32
    return config


@pytest.mark.parametrize("name", NAMES)
def test_a_name_means_what_it_means_to_the_bench(name):
    config, form = wide_gemma(), parse_format(name)
    source = CacheSource(config, 2, 3, 0, None)
    cache: Any = source.maker(form)()
    for layer in range(3):
        x = torch.randn(2, 2, 20, 32)
        cache.update(x, x, layer)
    planned = size(config.to_dict(), name, 20, batch=2, sinks=2, recent=3)
    assert planned.stored + planned.kept == cache.nbytes - cache.table_nbytes
    if form.family != "vllm":  # theirs are not counted
        unused: Any = source.maker(form)()
        assert planned.tables == own_tables(unused.scheme, config)


@pytest.mark.parametrize("context", [40, 400])
@pytest.mark.parametrize("windows", [(0, 0), (2, 0), (4, 6)])
def test_a_fitted_cache_takes_at_most_what_is_planned(lm, context, windows):
    rows = [lm.encode_prompt(f"Sentence {n} has {n * n} words in it.") for n in range(20)]
    sinks, recent = windows
    calibration = calibrate(lm, rows, sinks=sinks, recent=recent, context=context)
    config = core(lm).config
    shape = cache_shape(config.to_dict(), "model")
    for bits in (1, 2.75, 3.5, 5):
        form = stored_format(f"fitted:{bits}")
        planned = cache_size(shape, form, context, 3, sinks, recent)
        assert planned.stored == math.ceil(3 * packed_alike(shape, bits, context, windows))
        cache = fitted_cache(config, calibration.plan_of_bits(bits), context)
        found = cache.nbytes - cache.table_nbytes
        # The calibration counts the windows' tokens as packed: so many bytes may go elsewhere.
        windowless = cache_size(shape, form, context, 3)
        assert 0.85 * (planned.stored + planned.kept) <= found
        assert found <= windowless.stored + planned.kept


def packed_alike(shape, bits, context, windows):
    """Bytes of a sequence with the same bits in every layer."""
    low, high = (
        cache_size(shape, stored_format(f"k{each}v{each}"), context, 1, *windows).stored
        for each in (int(bits), min(int(bits) + 1, 5))
    )
    return low + (high - low) * (bits - int(bits))


def test_tables_of_a_fitted_cache(lm):
    """All but codebooks to the byte; of these the most that three groups may need."""
    config = core(lm).config
    shape, form = cache_shape(config.to_dict(), "model"), stored_format("fitted:3")
    rows = [lm.encode_prompt(f"Sentence {n} has {n * n} words in it.") for n in range(20)]
    plan = calibrate(lm, rows, sinks=0, recent=0, context=20).plan_of_bits(3)
    planned, books = cache_size(shape, form, 20).tables, 2 * len(shape.layers) * 4 * (63 + 31 + 15)
    unfolded = own_tables(FittedScheme(plan), config)
    layers = tuple(replace(layer, value=layer.value.without_map()) for layer in plan.layers)
    folded = own_tables(FittedScheme(replace(plan, layers=layers)), config)
    assert 0 <= planned - folded < books
    assert unfolded - folded == value_maps(shape, form)
    in_use = fitted_cache(config, plan, 20).table_nbytes
    assert unfolded <= in_use < unfolded + 1024 * 2 * len(shape.layers)  # compiled loops' copies


def fitted_cache(config, plan, context):
    cache = TurboQuantCache(config, FittedScheme(plan))
    for layer in range(config.num_hidden_layers):
        cache.update(*random_kv(3, context), layer)
    return cache


def test_windows_in_16_bits_are_not_packed_too():
    plain = size(LLAMA_8B, "k4v4", 1000)
    found = size(LLAMA_8B, "k4v4", 1000, sinks=4, recent=64)
    assert found.stored == plain.stored // 1000 * (1000 - 68)
    assert found.kept == 32 * 8 * 512 * 68
    everything = size(LLAMA_8B, "k4v4", 50, sinks=4, recent=64)
    assert (everything.stored, everything.kept) == (0, 32 * 8 * 512 * 50)
    assert size(LLAMA_8B, "fp8", 50, sinks=4).total == size(LLAMA_8B, "fp8", 50).total


@pytest.mark.parametrize(
    ("length", "expected"),
    # The layer holds 7: sinks 0-2, the last 2
    [(4, 4), (7, 5), (8, 4), (10, 2), (30, 2)],
)
def test_a_sliding_layer_keeps_the_sinks_that_it_still_holds(length, expected):
    shape = CacheShape("model", (LayerShape(1, 8, 8, 8),), None)
    found = cache_size(shape, stored_format("k4v4"), length, sinks=3, recent=2)
    assert found.kept == expected * 8 * 2 * 2
    assert found.stored == (min(length, 7) - expected) * 2 * (4 + 2)


UNKNOWN = ["", "k6v4", "k4", "K4V4", "vllm:2bit", "vllm:2bit:all", "k4v4 ", "mse:5.5", "polar"]


@pytest.mark.parametrize("name", [*UNKNOWN, "fitted:0.5", "fitted:5.5", "fitted:8", "fitted"])
def test_an_unknown_format_is_named(name):
    with pytest.raises(ConfigError, match=r"--format: expected bf16, .*k<bits>v<bits>.*found"):
        stored_format(name)


def test_a_head_size_that_cannot_be_packed():
    config = LLAMA_8B | {"head_dim": 100}
    assert size(config, "bf16", 1).total == 32 * 8 * 100 * 4
    for name in ("k4v4", "fitted:3", "vllm:k8v4"):
        with pytest.raises(ModelError, match="multiples of 8, found 100"):
            size(config, name, 1)
    with pytest.raises(ModelError, match=r"multiples of 16, found 72\. mse:3\.5 does not store it"):
        size(LLAMA_8B | {"head_dim": 72}, "mse:3.5", 1)
