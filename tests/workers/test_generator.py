import dataclasses

import pytest
import torch
from transformers.utils import logging

from stillhouse.configs.stages import CompressConfig
from stillhouse.workers.divergence import compressed_cache_factory
from stillhouse.workers.generator import generate
from stillhouse.workers.protocols import Completion, Decoding, Failed
from tests.workers.cache_models import with_nan_embedding

PROMPTS = ["a", "the second prompt", "b c", "x" * 30, "", "ä€"]


@pytest.fixture(autouse=True)
def transformers_is_silent(capfd):
    logging.set_verbosity_warning()
    yield
    assert capfd.readouterr().err == ""


def reference(lm, prompt, new_tokens):
    """Greedy continuation by whole forward passes, one row, no cache, no generate()."""
    ids = lm.encode_prompt(prompt)
    start = len(ids)
    with torch.no_grad():
        for _ in range(new_tokens):
            ids.append(int(lm.model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in lm.eos_ids:
                break
    return lm.decode(ids[start:])


def test_greedy_text_is_that_of_plain_forward_passes(lm):
    prompts = [prompt for prompt in PROMPTS if prompt]
    made = generate(lm, prompts, Decoding(max_new_tokens=12, batch_size=4))
    assert [one.text for one in made] == [reference(lm, p, 12).strip() for p in prompts]


def test_answers_do_not_depend_on_the_batch(lm):
    prompts = [prompt for prompt in PROMPTS if prompt]
    for temperature in (0.0, 0.8):
        how = Decoding(max_new_tokens=8, temperature=temperature, seed=3)
        alone = generate(lm, prompts, dataclasses.replace(how, batch_size=1))
        assert generate(lm, prompts, dataclasses.replace(how, batch_size=5)) == alone


def test_samples_follow_the_seed_and_leave_the_global_random_state_alone(llama):
    how = Decoding(max_new_tokens=8, temperature=1.0, seed=1)
    before = torch.random.get_rng_state()
    first = generate(llama, ["ab", "ab"], how)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(99)
    assert generate(llama, ["ab", "ab"], how) == first
    assert first[0] != first[1]  # equal prompts, streams of their own
    assert generate(llama, ["ab", "ab"], dataclasses.replace(how, seed=2)) != first


def test_samples_have_the_softmax_distribution(llama):
    temperature, draws = 2.0, 4000
    how = Decoding(max_new_tokens=1, temperature=temperature, batch_size=draws)
    with torch.no_grad():
        logits_V = llama.model(torch.tensor([llama.encode_prompt("q")])).logits[0, -1]
    # The likeliest letter: single bytes above 127 are not text of their own.
    letters = llama.encode_response("abcdefghijklmnopqrstuvwxyz")
    best = max(letters, key=lambda token: logits_V[token])
    expected = (logits_V / temperature).softmax(-1)[best].item()
    text = llama.decode([best])
    hits = sum(one.text == text for one in generate(llama, ["q"] * draws, how))
    error = (expected * (1 - expected) / draws) ** 0.5
    assert abs(hits / draws - expected) < 4 * error


def test_a_stop_string_ends_the_answer_and_is_cut(llama):
    whole = reference(llama, "the second prompt", 12)
    mark = whole[4:6]
    at = whole.find(mark)
    how = Decoding(max_new_tokens=12, stop=("never there", mark))
    (made,) = generate(llama, ["the second prompt"], how)
    assert made.text == whole[:at].strip()
    assert made.finish == "stop"
    assert made.tokens < 12


def test_generation_ends_when_every_row_has_ended(llama, monkeypatch):
    calls = []
    forward = llama.model.forward

    def counted(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(llama.model, "forward", counted)
    first = reference(llama, "a", 1)
    calls.clear()
    generate(llama, ["a"], Decoding(max_new_tokens=30, stop=(first,)))
    assert len(calls) == 1


def test_eos_ends_an_answer_and_is_not_in_it(llama):
    with torch.no_grad():
        next_id = int(llama.model(torch.tensor([llama.encode_prompt("a")])).logits[0, -1].argmax())
    ending = dataclasses.replace(llama, eos_ids=(next_id,))
    assert generate(ending, ["a"], Decoding(max_new_tokens=5)) == [Completion("", "stop", 1, 1)]


def test_length_is_said_when_nothing_ended_the_answer(llama):
    (made,) = generate(dataclasses.replace(llama, eos_ids=()), ["a"], Decoding(max_new_tokens=3))
    assert (made.finish, made.tokens) == ("length", 3)


def test_a_prompt_without_room_for_its_answer_fails_in_its_place(lm):
    made = generate(lm, ["ok", "y" * 100, "ok"], Decoding(max_new_tokens=4))
    assert isinstance(made[1], Failed)
    assert made[1].reason.startswith("prompt_too_long")
    assert isinstance(made[0], Completion)
    assert made[0] == made[2]


def test_an_empty_prompt_needs_a_bos(llama, gemma):
    how = Decoding(max_new_tokens=2)
    assert isinstance(generate(llama, [""], how)[0], Failed)
    assert isinstance(generate(gemma, [""], how)[0], Completion)


def test_no_prompts_no_answers(llama):
    assert generate(llama, [], Decoding(max_new_tokens=2)) == []


def test_the_models_own_generation_defaults_stay_with_the_model(llama):
    generate(llama, ["a"], Decoding(max_new_tokens=2))
    assert llama.model.generation_config.repetition_penalty == 9.0


def test_only_the_last_position_of_a_prompt_is_projected(lm):
    widths = []
    hook = lm.model.lm_head.register_forward_hook(lambda *call: widths.append(call[1][0].shape[1]))
    try:
        generate(lm, ["a prompt", "b"], Decoding(max_new_tokens=3))
    finally:
        hook.remove()
    assert set(widths) == {1}


def test_a_prompt_that_the_compressed_cache_cannot_hold_fails_alone(llama):
    broken = with_nan_embedding(llama, "x")
    how = Decoding(max_new_tokens=4, batch_size=4)
    cache = compressed_cache_factory(llama, CompressConfig())
    [first, failed, last] = generate(broken, ["good", "bad x", "also"], how, cache)
    assert isinstance(failed, Failed)
    assert failed.reason.startswith("not_finite: expected finite vectors")
    assert [first, last] == generate(llama, ["good", "also"], how, cache)


def test_a_model_that_gives_no_number_gives_no_answer(llama):
    broken = with_nan_embedding(llama, "x")
    how = Decoding(max_new_tokens=4, batch_size=4)
    [first, failed, last] = generate(broken, ["good", "bad x", "also"], how)
    assert failed == Failed("not_finite: the model gives the next token no number")
    assert [first, last] == generate(llama, ["good", "also"], how)
