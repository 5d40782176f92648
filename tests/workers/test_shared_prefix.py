"""A prefix computed once gives what computing it in every row gives."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stillhouse.workers import shared_prefix
from stillhouse.workers.models.language_model import load
from stillhouse.workers.projection import TargetRow
from stillhouse.workers.protocols import ModelSpec, Pair
from stillhouse.workers.scorer import pair_logps, response_logps
from stillhouse.workers.shared_prefix import LEAST_TOKENS, PrefixSource, shared_length
from tests.workers.conftest import CONTEXT

HEAD = "Classify the text in one word.\n"  # longer than Gemma's window of 8


@pytest.fixture
def prefixes(monkeypatch):
    """The prefixes that are computed, as ids."""
    made = []
    compute = PrefixSource._compute

    def counted(self, ids):
        made.append(list(ids))
        compute(self, ids)

    monkeypatch.setattr(PrefixSource, "_compute", counted)
    return made


def reference(double, lm, pair):
    """float64, all logits, one row at a time."""
    prompt, response = lm.encode_prompt(pair.prompt), lm.encode_response(pair.response)
    with torch.no_grad():
        logp_TV = double(torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
    return [logp_TV[len(prompt) - 1 + i, token].item() for i, token in enumerate(response)]


@pytest.fixture
def double(model_folders, store, lm):
    return load(store, ModelSpec(str(model_folders[lm.name])), dtype="float64").model


words = st.text("abc xyz", min_size=1, max_size=20)


@settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(
    tails=st.lists(st.tuples(words, words), min_size=1, max_size=9),
    head=st.integers(0, len(HEAD)),
    batch_size=st.integers(1, 8),
)
def test_ragged_rows_behind_any_prefix_agree_with_float64(lm, double, tails, head, batch_size):
    pairs = [Pair(HEAD[:head] + prompt, response) for prompt, response in tails]
    for pair, made in zip(pairs, response_logps(lm, pairs, batch_size), strict=True):
        assert made.logp == pytest.approx(reference(double, lm, pair), abs=2e-5)


def test_one_prefix_serves_all_batches_of_a_call(lm, prefixes, double):
    pairs = [Pair(f"{HEAD}{'x' * (at % 5)}{at}", f" {at}") for at in range(24)]
    made = response_logps(lm, pairs, batch_size=8)
    assert len(prefixes) == 1
    assert len(prefixes[0]) >= len(HEAD)
    for pair, one in zip(pairs, made, strict=True):
        assert one.logp == pytest.approx(reference(double, lm, pair), abs=2e-5)
    alone = [response_logps(lm, [pair], 1)[0] for pair in pairs]
    assert len(prefixes) == 1  # one row shares nothing
    for one, other in zip(made, alone, strict=True):
        assert one.logp == pytest.approx(other.logp, abs=1e-5)


def test_another_prefix_is_computed_anew(llama, prefixes):
    """The two templates' rows differ in length, so they do not meet in a batch."""
    pairs = [Pair(f"{HEAD}{at}{'z' * 30}", "y") for at in range(8)]
    pairs += [Pair(f"{HEAD[::-1]}{at}", "y") for at in range(8)]
    response_logps(llama, pairs, batch_size=8)
    assert len(prefixes) == 2


def test_the_token_before_the_first_target_is_never_left_out():
    same = [TargetRow([1, 2, 3, 4], 2)] * 3
    assert shared_length(same) == 1
    assert shared_length([TargetRow([1, 2, 3, 4], 1), TargetRow([1, 2, 9], 1)]) == 1
    assert shared_length([TargetRow([1, 2, 3, 4, 5], 1), TargetRow([1, 2, 9, 9, 9], 1)]) == 2
    assert shared_length([TargetRow([1, 2], 1), TargetRow([3, 2], 1)]) == 0


@pytest.mark.parametrize("change", ["short", "few", "one"])
def test_where_it_saves_little_nothing_is_shared(llama, change):
    length = LEAST_TOKENS - 1 if change == "short" else LEAST_TOKENS + 1
    count = {"short": 50, "few": 4, "one": 1}[change]
    rows = [TargetRow([*range(length), at, at], 1) for at in range(count)]
    assert PrefixSource(llama).shared(rows) == (0, None)


def test_a_model_that_shares_keys_between_layers_shares_no_prefix(llama, monkeypatch):
    rows = [TargetRow([*range(40), at, at], 1) for at in range(9)]
    with torch.inference_mode():
        assert PrefixSource(llama).shared(rows)[0] == 40
    monkeypatch.setattr(llama.model.config, "num_kv_shared_layers", 1, raising=False)
    assert PrefixSource(llama).shared(rows) == (0, None)


def test_linear_attention_shares_no_prefix(llama, monkeypatch):
    def refuse(config):
        raise ValueError("linear attention")

    monkeypatch.setattr(shared_prefix, "layer_windows", refuse)
    rows = [TargetRow([*range(40), at, at], 1) for at in range(9)]
    assert PrefixSource(llama).shared(rows) == (0, None)


def test_a_prefix_may_fill_nearly_the_context(llama):
    head = "h" * (CONTEXT - 4)
    made = response_logps(llama, [Pair(f"{head}{at}", "ab") for at in range(8)], batch_size=8)
    assert all(len(one.logp) == 2 for one in made)


def test_each_state_of_an_adapter_has_a_prefix_of_its_own(specialist, llama, prefixes):
    pairs = [Pair(f"{HEAD}{at}", f" {at}") for at in range(8)]
    made = pair_logps(specialist, specialist, pairs, batch_size=8)
    assert len(prefixes) == 2
    for pair, one in zip(pairs, made, strict=True):
        assert one.logp_base == pytest.approx(response_logps(llama, [pair], 1)[0].logp, abs=1e-5)
        (alone,) = response_logps(specialist, [pair], 1)
        assert one.logp_specialist == pytest.approx(alone.logp, rel=2e-5)
