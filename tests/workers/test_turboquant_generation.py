"""TurboQuantCache in whole models: logits and generated text are nearly those of full precision.

`pytest -m gpu` runs all of it on a CUDA device too.
"""

import dataclasses

import pytest
import torch
from transformers import DynamicCache

from stillhouse.workers.cache import CacheFormat, FittedScheme, ObliviousScheme, TurboQuantCache
from stillhouse.workers.calibrator import calibrate
from tests.workers import cache_models
from tests.workers.cache_models import step_logits

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EIGHT_BITS = ObliviousScheme(CacheFormat(key_bits=8, value_bits=8))


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def model(model, device):
    return model.to(device)


@pytest.fixture(params=["oblivious", "fitted"])
def scheme(request, model, llama):
    """4 bits and two sinks."""
    if request.param == "oblivious":
        return ObliviousScheme(CacheFormat(4, 4, sinks=2))
    lm = dataclasses.replace(llama, model=model.requires_grad_(False))
    rows = [cache_models.tokens(1, 40, seed)[0].tolist() for seed in range(3)]
    return FittedScheme(calibrate(lm, rows, sinks=2, recent=0, context=40).plan_of_bits(4))


@pytest.fixture
def tokens(device):
    def make(batch, length, seed=0):
        return cache_models.tokens(batch, length, seed).to(device)

    return make


def kl(reference, other):
    p, q = reference.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("pieces", [[20], [1] * 20, [5, 1, 1, 9, 4], [3, 17]])
def test_eight_bits_follow_the_full_precision_cache(model, tokens, pieces):
    # 20 tokens run far past Gemma's window of 8, in one piece and in many.
    ids = tokens(2, 20)
    expected = step_logits(model, ids, DynamicCache(config=model.config), [20])
    found = step_logits(model, ids, TurboQuantCache(model.config, EIGHT_BITS), pieces)
    four = step_logits(model, ids, TurboQuantCache(model.config), pieces)
    # A sliding layer that showed one token too many or too few gives a KL of more than 0.01.
    assert kl(expected, found) < 1e-3
    assert kl(expected, four) > 10 * kl(expected, found)  # the codec is in the path


def test_pieces_do_not_change_the_logits(model, tokens, scheme):
    ids = tokens(2, 20)
    whole = step_logits(model, ids, TurboQuantCache(model.config, scheme), [20])
    pieces = step_logits(model, ids, TurboQuantCache(model.config, scheme), [7, 1, 1, 11])
    torch.testing.assert_close(whole, pieces, atol=2e-3, rtol=0)


@torch.no_grad()
def test_a_right_padded_batch_equals_single_sequences(model, tokens, scheme):
    short, long = tokens(1, 5, seed=1), tokens(1, 11, seed=2)
    padded = torch.cat((short, torch.zeros_like(long[:, 5:])), dim=1)
    batch = torch.cat((padded, long))
    cache = TurboQuantCache(model.config, scheme)  # no `padding`: each begins at its first slot
    together = model(batch, attention_mask=(batch != 0).long(), past_key_values=cache).logits
    for row, ids in enumerate((short, long)):
        alone = step_logits(model, ids, TurboQuantCache(model.config, scheme), [ids.shape[1]])
        torch.testing.assert_close(together[row, : ids.shape[1]], alone[0], atol=2e-3, rtol=0)


def generate(model, ids, mask=None, cache=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    if cache is None:
        cache = TurboQuantCache(model.config, EIGHT_BITS)
    options = {"max_new_tokens": 12, "do_sample": False} | options
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **options)


def test_generate_takes_the_best_tokens_of_full_precision(model, tokens):
    ids = tokens(2, 6)
    out = generate(model, ids)
    assert out.shape == (2, 18)
    logits = step_logits(model, out, DynamicCache(config=model.config), [18])[:, 5:-1]
    chosen = logits.gather(2, out[:, 6:, None]).squeeze(2)
    # Equal sequences would ask more than 8 bits promise where two tokens are nearly even.
    assert bool((chosen > logits.amax(2) - 0.1).all())
    assert float(logits.std()) > 0.5


def test_left_padded_batch_equals_single_sequences(model, tokens, scheme):
    short, long = tokens(1, 4, seed=1), tokens(1, 11, seed=2)
    batch = torch.cat((torch.cat((torch.zeros_like(long[:, 4:]), short), dim=1), long))
    cache = TurboQuantCache(model.config, scheme, padding=[7, 0])
    together = generate(model, batch, (batch != 0).long(), cache)
    for row, ids in enumerate((short, long)):
        alone = generate(model, ids, cache=TurboQuantCache(model.config, scheme))
        assert torch.equal(together[row, 11:], alone[0, ids.shape[1] :])


def test_generation_goes_on_from_the_same_cache(model, tokens, scheme):
    ids = tokens(1, 5)
    cache = TurboQuantCache(model.config, scheme)
    first = generate(model, ids, cache=cache, max_new_tokens=6)
    assert cache.get_seq_length() == 10  # the last token has not been through the model
    second = generate(model, first, cache=cache, max_new_tokens=6)
    once = generate(model, ids, cache=TurboQuantCache(model.config, scheme), max_new_tokens=12)
    assert torch.equal(second, once)


def test_beam_search_equals_full_precision(model, tokens):
    ids = tokens(2, 6)
    full = generate(model, ids, cache=DynamicCache(config=model.config), num_beams=3)
    assert torch.equal(generate(model, ids, num_beams=3), full)


def test_assisted_generation_takes_tokens_back(model, tokens, scheme):
    # Prompt lookup drafts tokens, and the cache forgets those that are rejected.
    ids = tokens(1, 4).repeat(1, 3)
    cache = TurboQuantCache(model.config, scheme)
    found = generate(model, ids, cache=cache, prompt_lookup_num_tokens=3)
    assert torch.equal(found, generate(model, ids, cache=TurboQuantCache(model.config, scheme)))


def test_assisted_generation_with_recent_tokens_holds_no_more_than_plain(model, tokens):
    recent = ObliviousScheme(CacheFormat(4, 4, sinks=2, recent=5))
    assisted, plain = (TurboQuantCache(model.config, recent) for _ in range(2))
    ids = tokens(1, 4).repeat(1, 3)
    out = generate(model, ids, cache=assisted, prompt_lookup_num_tokens=3)
    step_logits(model, out, plain, [assisted.get_seq_length()])
    assert assisted.nbytes == plain.nbytes
