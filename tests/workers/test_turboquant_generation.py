"""TurboQuantCache in whole models: logits and generated text are nearly those of full precision."""

import pytest
import torch
from transformers import DynamicCache

from stillhouse.workers.cache import CacheFormat, ObliviousScheme, TurboQuantCache
from tests.workers.cache_models import step_logits, tokens

EIGHT_BITS = ObliviousScheme(CacheFormat(key_bits=8, value_bits=8))


def kl(reference, other):
    p, q = reference.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


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
