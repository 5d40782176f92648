"""Moments and Fisher information against tensors computed without the watching attention."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from stillhouse.errors import ModelError
from stillhouse.workers.models.language_model import LanguageModel
from stillhouse.workers.moments import VectorMoments, stream_moments, watched_attention
from tests.workers.cache_models import gemma, llama

SKIP = 2


def as_lm(model: Any) -> LanguageModel:
    lm = LanguageModel.__new__(LanguageModel)
    object.__setattr__(lm, "model", model.requires_grad_(False))
    object.__setattr__(lm, "pad", 0)
    return lm


@pytest.fixture(params=[llama, gemma])
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return as_lm(request.param())


ROWS = [[5, 9, 3, 30, 12, 7, 7, 21], [4, 40, 11, 6, 6, 33], [8, 9]]


def cached(lm: LanguageModel, row: list[int]) -> Any:
    cache = DynamicCache()  # without a config: it keeps all tokens of sliding layers too
    lm.model(torch.tensor([row]), past_key_values=cache)
    return cache


def test_means_and_covariances_are_those_of_what_is_cached(lm: LanguageModel) -> None:
    layers = stream_moments(lm, ROWS, SKIP)
    for index, layer in enumerate(layers):
        caches = [cached(lm, row).layers[index] for row in ROWS[:2]]
        for kind, sums in (("keys", layer.key), ("values", layer.value)):
            x = torch.cat([getattr(cache, kind)[0, :, SKIP:] for cache in caches], dim=1).double()
            assert sums.tokens == x.shape[1] == 10
            torch.testing.assert_close(sums.mean(), x.mean(1), atol=1e-5, rtol=1e-4)
            centred = x - x.mean(1, keepdim=True)
            wanted = centred.mT @ centred / 10
            torch.testing.assert_close(sums.covariance(), wanted, atol=1e-4, rtol=1e-3)


def test_fisher_information_is_the_curvature_of_the_divergence(lm: LanguageModel) -> None:
    """½ δ^T F δ against the KL that a small error δ in every token's vectors makes."""
    row = ROWS[0]
    layers = stream_moments(lm, [row] * 3000, 0, seed=1)
    ids = torch.tensor([row])
    with torch.no_grad():
        exact = lm.model(ids).logits.double().log_softmax(-1)
    generator = torch.Generator().manual_seed(0)
    for index in (0, len(layers) - 1):
        for place, sums in enumerate((layers[index].key, layers[index].value)):
            kl, draws = 0.0, 300
            change = _noise(index, place, generator)
            with torch.no_grad(), watched_attention(lm.model, change):
                for _ in range(draws):
                    noisy = lm.model(ids).logits.double().log_softmax(-1)
                    kl += float((exact.exp() * (exact - noisy)).sum(-1).mean()) / draws
            wanted = 0.5 * EPSILON**2 * float(sums.fisher().diagonal(dim1=1, dim2=2).sum())
            assert kl == pytest.approx(wanted, rel=0.15)


EPSILON = 0.02


def _noise(index: int, place: int, generator: torch.Generator) -> Any:
    def change(layer: int, *pair: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if layer != index:
            return pair
        noise = EPSILON * torch.randn(pair[place].shape, generator=generator)
        return tuple(x + noise if at == place else x for at, x in enumerate(pair))

    return change


def test_watching_changes_nothing_and_ends(lm: LanguageModel) -> None:
    ids = torch.tensor([ROWS[0]])
    before = lm.model(ids).logits
    implementation = lm.model.config._attn_implementation
    with watched_attention(lm.model) as seen:
        during = lm.model(ids).logits
    assert torch.equal(before, during)
    assert sorted(seen) == list(range(lm.model.config.num_hidden_layers))
    assert lm.model.config._attn_implementation == implementation
    assert torch.equal(lm.model(ids).logits, before)


def test_one_pass_is_the_sum_of_its_parts_and_seeds_differ(lm: LanguageModel) -> None:
    whole = stream_moments(lm, ROWS, SKIP, seed=3)
    again = stream_moments(lm, ROWS, SKIP, seed=3)
    other = stream_moments(lm, ROWS, SKIP, seed=4)
    assert torch.equal(whole[0].key.gradient_HDD, again[0].key.gradient_HDD)
    assert not torch.equal(whole[0].key.gradient_HDD, other[0].key.gradient_HDD)
    assert torch.equal(whole[0].key.outer_HDD, other[0].key.outer_HDD)


def test_no_text_that_is_long_enough_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(ModelError, match="no text was longer than 8 tokens"):
        stream_moments(lm, ROWS, 8)


def test_an_offset_does_not_drown_the_covariance() -> None:
    x = torch.randn(1, 500, 4, generator=torch.Generator().manual_seed(0)).double()
    sums = VectorMoments.zeros(1, 4)
    for part in (x + 1e5).split(50, dim=1):
        sums.add(part, part)
    centred = x - x.mean(1, keepdim=True)
    torch.testing.assert_close(sums.covariance(), centred.mT @ centred / 500, atol=1e-4, rtol=1e-4)
