import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.configs.stages import CompressConfig
from stillhouse.workers.cache import ObliviousScheme, TurboQuantCache
from stillhouse.workers.divergence import (
    compressed_cache_factory,
    kl_divergence,
    log_probabilities,
    measure_cache,
)
from stillhouse.workers.evaluation import exact_match
from stillhouse.workers.models.language_model import Head
from stillhouse.workers.protocols import CacheMeasure, Failed, Pair
from stillhouse.workers.scorer import response_logps
from tests.workers.cache_models import with_nan_embedding

EIGHT_BITS = CompressConfig(key_bits=8, value_bits=8, sinks=0)
TWO_BITS = CompressConfig(key_bits=2, value_bits=2, sinks=0)


@pytest.mark.parametrize(
    ("prediction", "reference", "same"),
    [
        ("S52", "S52", True),
        (" s52. ", "S52", True),
        ("S52 .", "S52", True),
        ("left\t hand", "Left  hand", True),
        ("STRASSE", "straße", True),
        ("S52", "S53", False),
        ("S5.2", "S52", False),
        ("", "S52", False),
        ("S52 S52", "S52", False),
    ],
)
def test_exact_match(prediction, reference, same):
    assert exact_match(prediction, reference) is same


@given(st.text())
def test_a_text_matches_itself_in_any_frame(text):
    assert exact_match(f"  {text} ", text)


def test_divergence_by_hand():
    p_CV = torch.tensor([[0.5, 0.5], [0.9, 0.1]], dtype=torch.float64).log()
    q_CV = torch.tensor([[0.25, 0.75], [0.9, 0.1]], dtype=torch.float64).log()
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl_divergence(p_CV, q_CV).tolist() == pytest.approx([first, 0.0], abs=1e-15)
    other_way = kl_divergence(q_CV, p_CV)[0].item()
    assert other_way == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))


def test_log_probabilities_are_those_of_the_model(lm):
    text = "Some text of a kind."
    ids = lm.encode_prompt(text)
    with torch.no_grad():
        logits_TV = lm.model(torch.tensor([ids])).logits[0].double()
        hidden_TD = lm.model.get_decoder()(torch.tensor([ids])).last_hidden_state[0]
    cap = getattr(lm.model.config, "final_logit_softcapping", None)
    ours_TV = log_probabilities(hidden_TD, Head(lm.model.lm_head.weight, None, cap))
    torch.testing.assert_close(ours_TV, logits_TV.log_softmax(-1), rtol=1e-5, atol=1e-5)
    (measure,), _ = measure_cache(lm, [text], EIGHT_BITS)
    targets = torch.tensor(ids[1:])[:, None]
    expected = ours_TV[:-1].gather(1, targets).sum().item()
    assert measure.logp_full == pytest.approx(expected, rel=1e-6)
    assert measure.tokens == len(ids) - 1


def test_fewer_bits_diverge_more_and_take_less(lm):
    texts = ["Some text of a kind.", "Another one, rather longer than the first."]
    fine, fine_size = measure_cache(lm, texts, EIGHT_BITS)
    coarse, coarse_size = measure_cache(lm, texts, TWO_BITS)
    for one, other in zip(fine, coarse, strict=True):
        assert 0 <= one.kl_mean <= one.kl_max < 0.05
        assert one.kl_mean < other.kl_mean
        assert one.logp_full == other.logp_full
    assert coarse_size.bytes_per_token < fine_size.bytes_per_token
    assert coarse_size.bytes_per_token_16bit == fine_size.bytes_per_token_16bit


def test_sixteen_bit_bytes_by_hand(llama):
    _, size = measure_cache(llama, ["exactly 16 bytes"], EIGHT_BITS)
    # 3 layers, 2 key/value heads of 16, keys and values, 2 bytes each
    assert size.bytes_per_token_16bit == 3 * 2 * 16 * 2 * 2


def test_every_position_sees_the_compressed_cache_as_token_by_token_decoding_would(lm):
    text = "One pass, or one by one."
    ids = torch.tensor([lm.encode_prompt(text)])
    make = compressed_cache_factory(lm, TWO_BITS)
    with torch.no_grad():
        cache = make()
        steps = [
            lm.model(ids[:, at : at + 1], past_key_values=cache).logits[0, -1]
            for at in range(ids.shape[1])
        ]
        together = lm.model(ids, past_key_values=make()).logits[0]
    torch.testing.assert_close(torch.stack(steps), together, rtol=1e-3, atol=1e-3)


def test_scores_through_a_compressed_cache(lm):
    pairs = [Pair("Q: a\nA:", " yes"), Pair("another prompt", " n")]
    plain = response_logps(lm, pairs, 2)
    fine = response_logps(lm, pairs, 2, compressed_cache_factory(lm, EIGHT_BITS))
    coarse = response_logps(lm, pairs, 2, compressed_cache_factory(lm, TWO_BITS))
    for exact, near, far in zip(plain, fine, coarse, strict=True):
        assert near.logp == pytest.approx(exact.logp, abs=0.3)
        assert far.logp != pytest.approx(exact.logp, abs=1e-3)
    alone = response_logps(lm, pairs, 1, compressed_cache_factory(lm, EIGHT_BITS))
    assert [one.logp for one in alone] == [pytest.approx(one.logp, abs=1e-3) for one in fine]


@pytest.mark.parametrize(
    ("part", "factor", "kind", "found"),
    [
        ("lm_head", math.nan, "not_finite", "no log-probability"),
        ("model.layers.1.self_attn.v_proj", math.nan, "not_finite", "no log-probability"),
        ("model.layers.1.self_attn.v_proj", 1e6, "not_storable", "that float16 holds"),
    ],
)
def test_a_divergence_that_is_no_number_fails_its_text(llama, part, factor, kind, found):
    broken = replace(llama, model=copy.deepcopy(llama.model))
    with torch.no_grad():
        broken.model.get_submodule(part).weight *= factor
    ([failed], size) = measure_cache(broken, ["good text"], EIGHT_BITS)
    assert isinstance(failed, Failed)
    assert failed.reason.startswith(kind)
    assert found in failed.reason
    assert size.bytes_per_token == 0


def test_a_text_that_gives_no_number_leaves_the_others(llama):
    broken = with_nan_embedding(llama, "x")
    measures, size = measure_cache(broken, ["good text", "good"], EIGHT_BITS)
    assert [type(one) for one in measures] == [Failed, CacheMeasure]
    assert (measures[1:], size) == measure_cache(llama, ["good"], EIGHT_BITS)


def test_texts_that_cannot_be_measured_fail_in_their_place(llama):
    measures, size = measure_cache(llama, ["x", "good text", "y" * 97], EIGHT_BITS)
    assert [one.reason.split(":")[0] for one in measures if isinstance(one, Failed)] == [
        "too_short",
        "too_long",
    ]
    assert isinstance(measures[1], CacheMeasure)
    assert size.bytes_per_token > 0


def test_nothing_to_measure(llama):
    measures, size = measure_cache(llama, [], EIGHT_BITS)
    assert (measures, size.bytes_per_token) == ([], 0.0)
    assert isinstance(compressed_cache_factory(llama, EIGHT_BITS)(), TurboQuantCache)


MIXED = CompressConfig(
    key_bits=3, value_bits=2, key_scalar="norm", value_scalar="least_squares", sinks=0
)


def test_the_cost_of_a_cache_by_forward_passes(lm):
    text = "A text of some length."
    ids = lm.encode_prompt(text)
    row = torch.tensor([ids[:-1]])
    with torch.no_grad():
        full_TV = lm.model(row).logits[0].double().log_softmax(-1)
        cache = compressed_cache_factory(lm, MIXED)()
        packed_TV = lm.model(row, past_key_values=cache).logits[0].double().log_softmax(-1)
    kl_T = (full_TV.exp() * (full_TV - packed_TV)).sum(-1)
    logp = packed_TV.gather(1, torch.tensor(ids[1:])[:, None]).sum().item()
    ([measure], _) = measure_cache(lm, [text], MIXED)
    assert measure.kl_mean == pytest.approx(kl_T.mean().item(), rel=1e-3)
    assert measure.kl_max == pytest.approx(kl_T.max().item(), rel=1e-3)
    assert measure.kl_mean != pytest.approx(kl_T.median().item(), rel=1e-2)
    assert measure.logp_compressed == pytest.approx(logp, rel=1e-4)
    assert measure.logp_compressed != pytest.approx(measure.logp_full, rel=1e-4)


def test_bytes_over_two_texts_by_hand(llama):
    _, size = measure_cache(llama, ["exactly 16 bytes", "eight by"], MIXED)
    # 3 layers of 2 heads of 16: keys 3 bits and values 2 bits a coordinate, each with 2 bytes more
    packed = 3 * 2 * ((6 + 2) + (4 + 2))
    # tables, once: of keys and of values, float32 rotation 16 x 16, and the codec's few centroids
    cache = compressed_cache_factory(llama, MIXED)()
    with torch.no_grad():
        llama.model(torch.tensor([[1]]), past_key_values=cache)
    tables = cache.nbytes - packed
    assert tables > 2 * 16 * 16 * 4
    assert (size.bytes_per_token, size.table_bytes) == (packed, tables)
    assert size.bytes_per_token_16bit == 3 * 2 * 16 * 2 * 2


def test_the_cache_has_the_configured_format(llama):
    scheme = compressed_cache_factory(llama, MIXED)().scheme
    assert isinstance(scheme, ObliviousScheme)
    layout = scheme.format
    found = (layout.key_bits, layout.value_bits, layout.key_scalar, layout.value_scalar)
    assert found == (3, 2, "norm", "least_squares")
