"""Generated tokens that read the packed cache say what they say of the decoded one."""

from typing import Any

import pytest
import torch

from stillhouse.workers.cache import CacheFormat, ObliviousScheme, TurboQuantCache
from tests.workers import cache_models
from tests.workers.cache_models import tokens
from tests.workers.packed_steps import generated, left_padded, packed_model, scheme


@pytest.fixture(params=["llama", "gemma"])
def model(request: pytest.FixtureRequest) -> Any:
    """Gemma's window is wider than what a kernel wants, and slides while tokens are generated."""
    return cache_models.llama() if request.param == "llama" else cache_models.gemma(window=24)


@pytest.mark.parametrize("windows", [(0, 0), (3, 0), (0, 5), (2, 4)])
@pytest.mark.parametrize("name", ["mse", "fitted", "fp8"])
def test_one_sequence(model: Any, name: str, windows: tuple[int, int]) -> None:
    made = scheme(name, model.config.num_hidden_layers, *windows)
    ids = tokens(1, 30)
    plain = generated(model, ids, TurboQuantCache(model.config, made), None)
    cache = TurboQuantCache(model.config, made, attend_packed=True)
    found = generated(packed_model(model), ids, cache, None)
    torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-3 * float(plain.std()))


@pytest.mark.parametrize("windows", [(0, 0), (3, 0), (2, 4)])
@pytest.mark.parametrize("name", ["mse", "fitted"])
def test_a_padded_batch(model: Any, name: str, windows: tuple[int, int]) -> None:
    made = scheme(name, model.config.num_hidden_layers, *windows)
    ids, pads = tokens(3, 30), [0, 7, 28]
    mask = left_padded(ids, pads)
    plain = generated(model, ids, TurboQuantCache(model.config, made, pads), mask)
    cache = TurboQuantCache(model.config, made, pads, attend_packed=True)
    found = generated(packed_model(model), ids, cache, mask)
    torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-3 * float(plain.std()))


@pytest.mark.parametrize("windows", [(0, 0), (2, 4)])
def test_capped_scores(windows: tuple[int, int]) -> None:
    """Prompt and generated tokens alike, as transformers' eager attention caps them."""
    model = cache_models.gemma2(window=24)
    model.set_attn_implementation("eager")
    made = scheme("mse", 2, *windows)
    ids, pads = tokens(2, 30), [0, 5]
    mask = left_padded(ids, pads)
    plain = generated(model, ids, TurboQuantCache(model.config, made, pads), mask)
    cache = TurboQuantCache(model.config, made, pads, attend_packed=True)
    found = generated(packed_model(model), ids, cache, mask)
    torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-3 * float(plain.std()))


def test_packed_attention_works_under_autocast(model: Any) -> None:
    ids = tokens(1, 30)
    ready = packed_model(model)
    for name in ("mse", "fitted"):
        made = scheme(name, model.config.num_hidden_layers, 2, 3)
        cache = TurboQuantCache(model.config, made, attend_packed=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert bool(generated(ready, ids, cache, None).isfinite().all())


def test_greedy_and_beams_write_the_same(model: Any) -> None:
    ids = tokens(2, 25)
    for how in ({"num_beams": 1}, {"num_beams": 3}):
        texts = []
        for one, packed in ((model, False), (packed_model(model), True)):
            cache = TurboQuantCache(model.config, scheme("mse", 0, 2, 0), attend_packed=packed)
            texts.append(
                one.generate(
                    ids, attention_mask=torch.ones_like(ids), past_key_values=cache,
                    max_new_tokens=12, do_sample=False, pad_token_id=0, **how,
                )
            )  # fmt: skip
        assert torch.equal(*texts)


def test_another_attention_refuses_what_it_would_misread(model: Any) -> None:
    cache = TurboQuantCache(model.config, attend_packed=True)
    with pytest.raises(TypeError, match=r"call model\.set_attn_implementation"):
        generated(model, tokens(1, 30), cache, None)


@pytest.mark.parametrize(
    ("bits", "length", "decoded"), [(4, 30, False), (4, 3, True), (8, 30, True)]
)
def test_only_what_no_packed_kernel_reads_is_decoded(bits: int, length: int, decoded: bool) -> None:
    model = packed_model(cache_models.llama())
    made = ObliviousScheme(CacheFormat(bits, bits))
    cache = TurboQuantCache(model.config, made, attend_packed=True)
    with torch.no_grad():
        model(tokens(1, length), past_key_values=cache)
        calls: list[int] = []

        def counted(decode: Any) -> Any:
            def call(*args: Any) -> torch.Tensor:
                calls.append(1)
                return decode(*args)

            return call

        for layer in cache.layers:
            for codec in layer.codecs:
                codec.decode = counted(codec.decode)
        model(tokens(1, 1), past_key_values=cache)
    assert bool(calls) == decoded
