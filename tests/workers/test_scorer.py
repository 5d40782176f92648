import dataclasses
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stillhouse.configs.stages import CompressConfig
from stillhouse.workers.divergence import compressed_cache_factory
from stillhouse.workers.models.language_model import load
from stillhouse.workers.protocols import Failed, ModelSpec, Pair, PairLogp, ResponseLogp
from stillhouse.workers.scorer import pair_logps, response_logps
from tests.workers.cache_models import with_nan_embedding

PAIRS = [
    Pair("Q: a\nA:", " yes"),
    Pair("longer prompt, much longer", " n"),
    Pair("x", " a response that is longer than its prompt"),
    Pair("Q: b\nA:", " no"),
    Pair("äöü", " €"),
]


class TwoWordTokenizer:
    """Words `a` and `b` are tokens 0 and 1."""

    is_fast = True

    def __call__(self, text, add_special_tokens, return_offsets_mapping=False):
        if return_offsets_mapping:
            spans = [[(n, n + 1) for n in range(len(row))] for row in text]
            return type("Encoding", (), {"offset_mapping": spans})
        one = [ord(c) - ord("a") for c in text] if isinstance(text, str) else None
        several = [[ord(c) - ord("a") for c in row] for row in text]
        return type("Encoding", (), {"input_ids": several if one is None else one})


@pytest.fixture
def two_words(llama):
    """Always P(b) = 3 P(a): the final norm gives (1, 1) up to sign, the head's rows do the rest."""
    config = LlamaConfig(
        vocab_size=2,
        hidden_size=2,
        intermediate_size=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        rms_norm_eps=1e-12,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.fill_(0.7)
        model.lm_head.weight.copy_(torch.tensor([[0.0, 0.0], [0.0, math.log(3)]]))
    return dataclasses.replace(llama, model=model, tokenizer=TwoWordTokenizer(), pad=0)


def test_log_probabilities_known_by_hand(two_words):
    pairs = [Pair("ab", "ab"), Pair("b", "bba"), Pair("bbbb", "a")]
    a, b = math.log(1 / 4), math.log(3 / 4)
    made = response_logps(two_words, pairs, batch_size=2)
    assert [one.token_ids for one in made] == [[0, 1], [1, 1, 0], [0]]
    assert [one.logp for one in made] == [
        pytest.approx([a, b], abs=1e-6),
        pytest.approx([b, b, a], abs=1e-6),
        pytest.approx([a], abs=1e-6),
    ]


def test_a_log_probability_that_is_no_number_fails_its_pair_alone(two_words):
    with torch.no_grad():
        two_words.model.model.embed_tokens.weight[1] = math.nan  # seen by what follows a `b`
    broken, sound = response_logps(two_words, [Pair("ab", "ab"), Pair("aa", "ab")], batch_size=2)
    assert isinstance(broken, Failed)
    assert broken.reason.startswith("not_finite")
    assert sound.logp == pytest.approx([math.log(1 / 4), math.log(3 / 4)], abs=1e-6)


def test_agrees_with_a_float64_reference(model_folders, store, lm):
    double = load(store, ModelSpec(str(model_folders[lm.name])), dtype="float64").model
    for pair, made in zip(PAIRS, response_logps(lm, PAIRS, batch_size=3), strict=True):
        prompt, response = lm.encode_prompt(pair.prompt), lm.encode_response(pair.response)
        with torch.no_grad():
            logits_TV = double(torch.tensor([prompt + response])).logits[0].double()
        logp_TV = logits_TV.log_softmax(-1)
        expected = [logp_TV[len(prompt) - 1 + i, token].item() for i, token in enumerate(response)]
        assert made.token_ids == response
        assert made.logp == pytest.approx(expected, abs=2e-5)


def test_padding_changes_nothing(lm):
    alone = response_logps(lm, PAIRS, batch_size=1)
    for one, padded in zip(alone, response_logps(lm, PAIRS, batch_size=8), strict=True):
        assert padded.token_ids == one.token_ids
        assert padded.logp == pytest.approx(one.logp, abs=1e-5)


def test_rows_that_cannot_be_scored_fail_in_their_place(llama):
    pairs = [Pair("a", ""), PAIRS[0], Pair("y" * 90, " 1234567"), Pair("", "a")]
    made = response_logps(llama, pairs, batch_size=4)
    assert [one.reason.split(":")[0] for one in made if isinstance(one, Failed)] == [
        "empty_response",
        "pair_too_long",
        "empty_prompt",
    ]
    assert isinstance(made[1], ResponseLogp)


def test_no_pairs_no_scores(llama):
    assert response_logps(llama, [], batch_size=4) == []


def test_a_pair_that_fills_the_context_is_scored(llama):
    (made,) = response_logps(llama, [Pair("y" * 90, "123456")], batch_size=1)
    assert isinstance(made, ResponseLogp)


def test_with_the_adapter_off_the_model_is_its_base_exactly(specialist, llama):
    pairs = pair_logps(specialist, specialist, PAIRS, batch_size=2)
    base = response_logps(llama, PAIRS, batch_size=2)
    assert [pair.logp_base for pair in pairs] == [one.logp for one in base]
    on = response_logps(specialist, PAIRS, batch_size=2)
    assert [pair.logp_specialist for pair in pairs] == [one.logp for one in on]
    assert pairs[0].logp_specialist != pairs[0].logp_base


def test_one_model_with_an_adapter_equals_two_whole_models(specialist, llama):
    switched = pair_logps(specialist, specialist, PAIRS, batch_size=2)
    merged = specialist.model.merge_and_unload()
    whole = dataclasses.replace(specialist, model=merged)
    for one, two in zip(switched, pair_logps(whole, llama, PAIRS, batch_size=2), strict=True):
        assert one.token_ids == two.token_ids
        assert one.logp_base == two.logp_base
        assert one.logp_specialist == pytest.approx(two.logp_specialist, abs=1e-4)


def test_the_gap_is_positive_where_the_specialist_is_surer(two_words):
    surer = LlamaForCausalLM(two_words.model.config).eval()
    surer.load_state_dict(two_words.model.state_dict())
    with torch.no_grad():
        surer.lm_head.weight.copy_(torch.tensor([[0.0, 0.0], [0.0, math.log(9)]]))
    specialist = dataclasses.replace(two_words, model=surer)
    (pair,) = pair_logps(specialist, two_words, [Pair("a", "bb")], batch_size=1)
    gaps = [s - b for s, b in zip(pair.logp_specialist, pair.logp_base, strict=True)]
    assert gaps == pytest.approx([math.log(0.9 / 0.75)] * 2, abs=1e-6)


def test_a_failure_of_either_side_is_the_pairs(specialist):
    made = pair_logps(specialist, specialist, [Pair("a", ""), PAIRS[0]], batch_size=2)
    assert isinstance(made[0], Failed)
    assert isinstance(made[1], PairLogp)


def test_a_pair_that_the_compressed_cache_cannot_hold_fails_alone(llama):
    broken = with_nan_embedding(llama, "x")
    pairs = [Pair("good", " a"), Pair("bad x", " b"), Pair("also", " c")]
    cache = compressed_cache_factory(llama, CompressConfig())
    [first, failed, last] = response_logps(broken, pairs, 4, cache)
    assert isinstance(failed, Failed)
    assert failed.reason.startswith("not_finite: expected finite vectors")
    assert [first, last] == [response_logps(llama, [pair], 1, cache)[0] for pair in pairs[::2]]


def test_two_models_may_fail_different_pairs(llama, gemma):
    """Gemma has a BOS: it can score what follows nothing, and fits one token less."""
    pairs = [Pair("", "a"), Pair("y" * 90, "123456"), Pair("a", ""), PAIRS[0]]
    made = pair_logps(llama, gemma, pairs, batch_size=4)
    assert [one.reason.split(":")[0] for one in made if isinstance(one, Failed)] == [
        "empty_prompt",
        "pair_too_long",
        "empty_response",
    ]
    (one,), (two,) = (response_logps(lm, PAIRS[:1], 1) for lm in (llama, gemma))
    assert made[3].logp_specialist == pytest.approx(one.logp, abs=1e-5)
    assert made[3].logp_base == pytest.approx(two.logp, abs=1e-5)
    assert made[3].prompt_tokens == one.prompt_tokens
