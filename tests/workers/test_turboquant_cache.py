"""TurboQuantCache alone: what is stored, what attention sees, how many bytes."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from transformers import DynamicCache, Qwen3NextConfig

from stillhouse.kernels.turboquant import MseCodec
from stillhouse.workers.cache import CacheFormat, FittedScheme, ObliviousScheme, TurboQuantCache
from stillhouse.workers.calibrator import calibrate
from tests.workers.cache_models import (
    HEAD_DIM,
    HEADS,
    WINDOW,
    gemma,
    llama,
    random_kv,
    step_logits,
    tokens,
)


def test_update_returns_the_round_trip_of_the_codec():
    cache = TurboQuantCache(llama().config)
    keys, values = random_kv(2, 5)
    found_keys, found_values = cache.update(keys, values, 0)
    key_codec = MseCodec(HEAD_DIM, 4, "unbiased")
    value_codec = MseCodec(HEAD_DIM, 4, "least_squares")
    assert torch.equal(found_keys, key_codec.decode(key_codec.encode(keys)))
    assert torch.equal(found_values, value_codec.decode(value_codec.encode(values)))
    more_keys, more_values = random_kv(2, 1, seed=1)
    longer, _ = cache.update(more_keys, more_values, 0)
    torch.testing.assert_close(longer[:, :, :5], found_keys)
    last = key_codec.decode(key_codec.encode(more_keys))
    torch.testing.assert_close(longer[:, :, 5:], last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_returns_the_dtype_of_the_model(dtype):
    cache = TurboQuantCache(llama().config)
    keys, values = random_kv(1, 3).to(dtype)
    assert [x.dtype for x in cache.update(keys, values, 0)] == [dtype, dtype]


@pytest.mark.parametrize("length", [6, 20])
def test_crop_leaves_what_a_shorter_run_would_have(model, length):
    ids = tokens(2, length + 1)
    cropped, shorter = TurboQuantCache(model.config), TurboQuantCache(model.config)
    cropped.activate_past_recording()
    step_logits(model, ids, cropped, [length - 3, 3])
    cropped.crop(-3)
    step_logits(model, ids, shorter, [length - 3])
    assert cropped.get_seq_length() == length - 3
    assert cropped.nbytes == shorter.nbytes
    last = ids[:, -1:]
    found = step_logits(model, last, cropped, [1])
    torch.testing.assert_close(found, step_logits(model, last, shorter, [1]), atol=1e-5, rtol=0)


def test_crop_to_a_length_and_to_nothing():
    cache = TurboQuantCache(llama().config)
    keys, values = random_kv(1, 9)
    for layer in (0, 1):
        cache.update(keys, values, layer)
    cache.crop(4)  # a positive number is the length to keep, as in transformers
    assert cache.get_seq_length() == 4
    cache.crop(100)
    assert cache.get_seq_length() == 4
    cache.crop(-100)
    assert cache.get_seq_length() == 0


def test_crop_of_dropped_tokens_is_refused():
    model = gemma()
    cache = TurboQuantCache(model.config)
    step_logits(model, tokens(1, 20), cache, [20])
    with pytest.raises(RuntimeError, match="at least 10 stored tokens to remove 3 of 20, found 7"):
        cache.crop(-3)


def test_batch_operations_move_whole_sequences():
    def filled():
        cache = TurboQuantCache(llama().config)
        keys, values = random_kv(3, 5)
        return cache, cache.update(keys, values, 0)[0]

    def stored(cache):
        empty = random_kv(cache.batch_size, 0)
        return cache.update(empty[0], empty[1], 0)[0]

    cache, before = filled()
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(stored(cache), before[[2, 0, 0]])
    cache, before = filled()
    cache.batch_repeat_interleave(2)
    assert torch.equal(stored(cache), before.repeat_interleave(2, dim=0))
    cache, before = filled()
    cache.batch_select_indices(torch.tensor([1]))
    assert torch.equal(stored(cache), before[[1]])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.batch_size == -1


@pytest.mark.parametrize(("bits", "record"), [(4, 16 // 2 + 2), (3, 6 + 2), (2, 4 + 2), (8, 18)])
def test_bytes_are_those_of_the_format(model, bits, record):
    cache = TurboQuantCache(
        model.config, ObliviousScheme(CacheFormat(key_bits=bits, value_bits=bits))
    )
    assert cache.nbytes == 0
    step_logits(model, tokens(3, 20), cache, [12, 1, 1, 6])
    # A sliding layer keeps WINDOW - 1 tokens. Tables: one codec each for keys and values:
    # matrix, signs, codebook, and the compiled loops' mean, weights and four int64.
    kept = [WINDOW - 1 if sliding else 20 for sliding in cache.is_sliding]
    tables = 2 * (4 * (HEAD_DIM**2 + 3 * HEAD_DIM + 2 * 2**bits - 1) + 12 * 8)
    assert cache.nbytes == 3 * HEADS * 2 * record * sum(kept) + tables


def tensor_bytes(value, seen):
    """Bytes of every tensor's and array's storage that can be reached from an object."""
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        known = storage.data_ptr() in seen
        seen.add(storage.data_ptr())
        return 0 if known else storage.nbytes()
    if isinstance(value, np.ndarray):
        known = value.ctypes.data in seen
        seen.add(value.ctypes.data)
        return 0 if known else value.nbytes
    if isinstance(value, dict):
        return sum(tensor_bytes(v, seen) for v in value.values())
    if isinstance(value, (list, tuple)):
        return sum(tensor_bytes(v, seen) for v in value)
    names = [*getattr(value, "__dict__", {}), *getattr(type(value), "__slots__", ())]
    return sum(tensor_bytes(getattr(value, name, None), seen) for name in names)


def test_nothing_else_is_kept(model):
    cache = TurboQuantCache(model.config)
    step_logits(model, tokens(2, 20), cache, [12, 1, 7])
    assert tensor_bytes(cache, set()) == cache.nbytes


def test_nothing_else_is_kept_by_a_fitted_scheme(model, request):
    rows = [tokens(1, 40, seed)[0].tolist() for seed in range(3)]
    lm = dataclasses.replace(request.getfixturevalue("llama"), model=model.requires_grad_(False))
    plan = calibrate(lm, rows, sinks=2, recent=3, context=40).plan_of_bits(3)
    cache = TurboQuantCache(model.config, FittedScheme(plan))
    step_logits(model, tokens(2, 20), cache, [12, 1, 7])
    assert tensor_bytes(cache, set()) == cache.nbytes
    packed = 2 * 2 * HEADS * 20 * len(cache.layers) * HEAD_DIM * 2  # in 16 bits
    assert cache.nbytes - cache.table_nbytes < 0.5 * packed


def test_a_copy_is_independent(model):
    cache = TurboQuantCache(model.config)
    ids = tokens(1, 12)
    step_logits(model, ids, cache, [10])
    other = copy.deepcopy(cache)
    step_logits(model, ids, cache, [1])
    assert (cache.get_seq_length(), other.get_seq_length()) == (11, 10)


def test_mask_sizes_equal_those_of_transformers(model):
    cache, dynamic = TurboQuantCache(model.config), DynamicCache(config=model.config)
    for piece in (1, 5, 1, 1, 1, 9, 2):
        keys, values = random_kv(1, piece)
        for index in range(len(cache.layers)):
            assert cache.get_mask_sizes(piece, index) == dynamic.get_mask_sizes(piece, index)
            found, _ = cache.update(keys, values, index)
            expected, _ = dynamic.update(keys, values, index)
            assert found.shape == expected.shape
        assert cache.get_seq_length() == dynamic.get_seq_length()
    assert cache.is_sliding == dynamic.is_sliding
    assert cache.get_max_length() == dynamic.get_max_length()


def test_early_initialization_allocates_no_rows():
    config = llama().config
    cache = TurboQuantCache(config)
    cache.early_initialization(2, HEADS, HEAD_DIM, torch.float32, torch.device("cpu"))
    assert cache.is_initialized
    assert (cache.batch_size, cache.get_seq_length()) == (2, 0)
    keys, values = random_kv(2, 3)
    assert cache.update(keys, values, 0)[0].shape == keys.shape


def test_what_cannot_be_stored_is_refused():
    keys, values = random_kv(1, 3)
    values[0, 1, 2, 3] = torch.nan
    cache = TurboQuantCache(llama().config)
    with pytest.raises(ValueError, match="found 1 of 6 that are NaN"):
        cache.update(keys, values, 0)
    # Keys without their values would be a broken cache: nothing of the step was stored.
    assert cache.get_seq_length() == 0
    keys, values = random_kv(1, 2)
    assert [x.shape[2] for x in cache.update(keys, values, 0)] == [2, 2]
    with pytest.raises(ValueError, match=r"found \['linear_attention'\] in Qwen3NextConfig"):
        TurboQuantCache(Qwen3NextConfig(num_hidden_layers=4))
