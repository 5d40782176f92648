"""TurboQuantCache in transformers models: what is stored, what attention sees, how many bytes."""

import copy
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3NextConfig,
)

from stillhouse.kernels.turboquant import MseCodec
from stillhouse.workers.cache import CacheFormat, TurboQuantCache

VOCABULARY, WINDOW, HEADS, HEAD_DIM = 50, 8, 2, 16
EIGHT_BITS = CacheFormat(key_bits=8, value_bits=8)
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, initializer_range=0.2, **SIZES)).eval()


def gemma():
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        num_hidden_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=WINDOW,
        initializer_range=0.2,
        **SIZES,
    )
    return Gemma3ForCausalLM(config).eval()


@pytest.fixture(params=[llama, gemma], ids=["llama", "gemma"])
def model(request):
    return request.param()


def tokens(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


@torch.no_grad()
def step_logits(model, ids, cache, pieces):
    """Logits of every token, `ids` fed in `pieces` of the given lengths through one cache."""
    out, start = [], 0
    for piece in pieces:
        out.append(model(ids[:, start : start + piece], past_key_values=cache).logits)
        start += piece
    return torch.cat(out, dim=1)


def kl(reference, other):
    p, q = reference.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def random_kv(batch, length, seed=0):
    shape = (batch, HEADS, length, HEAD_DIM)
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))


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


@pytest.mark.parametrize("pieces", [[20], [1] * 20, [5, 1, 1, 9, 4], [3, 17]])
def test_eight_bits_follow_the_full_precision_cache(model, pieces):
    # 20 tokens run far past Gemma's window of 8, in one piece and in many.
    ids = tokens(2, 20)
    expected = step_logits(model, ids, DynamicCache(config=model.config), [20])
    found = step_logits(model, ids, TurboQuantCache(model.config, EIGHT_BITS), pieces)
    four = step_logits(model, ids, TurboQuantCache(model.config), pieces)
    # A sliding layer that showed one token too many or too few gives a KL of more than 0.01.
    assert kl(expected, found) < 1e-3
    assert kl(expected, four) > 10 * kl(expected, found)  # the codec is in the path


def test_pieces_do_not_change_the_logits(model):
    ids = tokens(2, 20)
    whole = step_logits(model, ids, TurboQuantCache(model.config), [20])
    pieces = step_logits(model, ids, TurboQuantCache(model.config), [7, 1, 1, 11])
    torch.testing.assert_close(whole, pieces, atol=2e-3, rtol=0)


def generate(model, ids, mask=None, cache=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    if cache is None:
        cache = TurboQuantCache(model.config, EIGHT_BITS)
    options = {"max_new_tokens": 12, "do_sample": False} | options
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **options)


def test_generate_takes_the_best_tokens_of_full_precision(model):
    ids = tokens(2, 6)
    out = generate(model, ids)
    assert out.shape == (2, 18)
    logits = step_logits(model, out, DynamicCache(config=model.config), [18])[:, 5:-1]
    chosen = logits.gather(2, out[:, 6:, None]).squeeze(2)
    # Equal sequences would ask more than 8 bits promise where two tokens are nearly even.
    assert bool((chosen > logits.amax(2) - 0.1).all())
    assert float(logits.std()) > 0.5


def test_left_padded_batch_equals_single_sequences(model):
    short, long = tokens(1, 4, seed=1), tokens(1, 11, seed=2)
    padded = torch.cat((torch.zeros(1, 7, dtype=torch.int64), short), dim=1)
    batch = torch.cat((padded, long))
    together = generate(model, batch, (batch != 0).long())
    assert torch.equal(together[0, 11:], generate(model, short)[0, 4:])
    assert torch.equal(together[1], generate(model, long)[0])


def test_generation_goes_on_from_the_same_cache(model):
    ids = tokens(1, 5)
    cache = TurboQuantCache(model.config)
    first = generate(model, ids, cache=cache, max_new_tokens=6)
    assert cache.get_seq_length() == 10  # the last token has not been through the model
    second = generate(model, first, cache=cache, max_new_tokens=6)
    once = generate(model, ids, cache=TurboQuantCache(model.config), max_new_tokens=12)
    assert torch.equal(second, once)


def test_beam_search_equals_full_precision(model):
    ids = tokens(2, 6)
    full = generate(model, ids, cache=DynamicCache(config=model.config), num_beams=3)
    assert torch.equal(generate(model, ids, num_beams=3), full)


def test_assisted_generation_takes_tokens_back(model):
    # Prompt lookup drafts tokens, and the cache forgets those that are rejected.
    ids = tokens(1, 4).repeat(1, 3)
    found = generate(model, ids, prompt_lookup_num_tokens=3)
    assert torch.equal(found, generate(model, ids))


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
    cache = TurboQuantCache(model.config, CacheFormat(key_bits=bits, value_bits=bits))
    assert cache.nbytes == 0
    step_logits(model, tokens(3, 20), cache, [12, 1, 1, 6])
    # A sliding layer keeps WINDOW - 1 tokens. Tables: one codec each for keys and values.
    kept = [WINDOW - 1 if sliding else 20 for sliding in cache.is_sliding]
    tables = 2 * 4 * (HEAD_DIM**2 + HEAD_DIM + 2 * 2**bits - 1)
    assert cache.nbytes == 3 * HEADS * 2 * record * sum(kept) + tables


def tensor_bytes(value, seen):
    """Bytes of every tensor storage that can be reached from an object."""
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        known = storage.data_ptr() in seen
        seen.add(storage.data_ptr())
        return 0 if known else storage.nbytes()
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
