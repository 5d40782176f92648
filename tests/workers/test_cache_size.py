"""Bytes of a cache: by hand, and against what the caches allocate."""

import pytest
import torch
from transformers import DynamicCache

from stillhouse.errors import ConfigError, ModelError
from stillhouse.kernels.turboquant import SUPPORTED_BITS, MseCodec
from stillhouse.workers.cache import CacheFormat, ObliviousScheme, TurboQuantCache
from stillhouse.workers.models.cache_shape import CacheShape, LayerShape, cache_shape
from stillhouse.workers.models.cache_size import cache_size, stored_format
from tests.workers.cache_models import gemma, llama, step_logits, tokens

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
    ],
)
def test_bytes_of_a_token_and_head(form, at_128, at_64):
    for dim, expected in ((128, at_128), (64, at_64)):
        found = stored_format(form)
        assert found.key.nbytes(dim) + found.value.nbytes(dim) == expected


def test_vllm_keeps_two_layers_at_each_end():
    found = size(LLAMA_70B, "vllm:4bit_nc", 10)
    assert (found.stored, found.kept, found.tables) == (76 * 8 * 134 * 10, 4 * 8 * 512 * 10, 0)
    few = LLAMA_70B | {"num_hidden_layers": 3}
    assert size(few, "vllm:4bit_nc", 10).total == size(few, "bf16", 10).total


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
    cache = TurboQuantCache(
        model.config, ObliviousScheme(CacheFormat(key_bits=bits[0], value_bits=bits[1]))
    )
    pieces = [length] if length < 3 else [length - 2, 1, 1]
    step_logits(model, tokens(3, length), cache, pieces)
    planned = size(model.config.to_dict(), f"k{bits[0]}v{bits[1]}", length, batch=3)
    assert planned.total == cache.nbytes


@pytest.mark.parametrize("model", [llama(), gemma()], ids=["llama", "gemma"])
def test_a_plan_is_what_the_16_bit_cache_allocates(model):
    cache = DynamicCache(config=model.config)
    step_logits(model.to(torch.bfloat16), tokens(2, 20), cache, [12, 1, 7])
    held = 0
    for layer in cache.layers:
        held += 2 * (layer.keys.numel() + layer.values.numel())
    assert size(model.config.to_dict(), "bf16", 20, batch=2).total == held


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


@pytest.mark.parametrize("name", ["", "k6v4", "k4", "K4V4", "vllm:2bit", "k4v4 "])
def test_an_unknown_format_is_named(name):
    with pytest.raises(ConfigError, match=r"--format: expected bf16, .*k<bits>v<bits>.*found"):
        stored_format(name)


def test_a_head_size_that_cannot_be_packed():
    config = LLAMA_8B | {"head_dim": 100}
    assert size(config, "bf16", 1).total == 32 * 8 * 100 * 4
    with pytest.raises(ModelError, match="multiples of 8, found 100"):
        size(config, "k4v4", 1)
