"""The toy models: named without torch, made once, and neither flat nor speechless."""

from dataclasses import fields, replace
from typing import Any, cast

import pytest
import torch

from stillhouse.workers.models import toy
from stillhouse.workers.models.language_model import LanguageModel, load
from stillhouse.workers.models.store import ModelStore
from stillhouse.workers.models.toy_training import toy_texts, train_toy
from stillhouse.workers.protocols import ModelSpec

PROMPT = "Diagnosis: Acute pain of lung\nICD-10-CM category:"


def test_the_text_is_seeded_and_shows_every_letter_and_digit_in_a_code():
    texts = list(toy_texts(1))
    assert texts == list(toy_texts(1))
    assert texts != list(toy_texts(2))
    codes = {text[-3:] for text in texts if "category:" in text}
    assert {code[0] for code in codes} == set("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    assert set("0123456789") == {digit for code in codes for digit in code[1:]}


@pytest.mark.parametrize("name", [field.name for field in fields(toy.ToyModel)])
def test_each_parameter_is_part_of_the_identity(name):
    model, change = toy.spec("llama"), cast(Any, {name: "other"})
    assert replace(model, **change).identity() != model.identity()


@pytest.fixture(scope="module", params=["llama", "gemma"])
def toy_lm(request, cache_root) -> LanguageModel:
    return load(ModelStore(cache_root), ModelSpec(f"toy:{request.param}"))


def logp(lm: LanguageModel, prompt: str, response: str) -> list[float]:
    head, tail = lm.encode_prompt(prompt), lm.encode_response(response)
    ids = torch.tensor([head + tail])
    with torch.no_grad():
        logits = lm.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    rows = logits[len(head) - 1 : -1].log_softmax(-1)
    return [float(row[token]) for row, token in zip(rows, tail, strict=True)]


@pytest.mark.models
def test_it_knows_the_form_over_the_whole_vocabulary(toy_lm):
    """Rows that were never trained must not hold probability."""
    form = logp(toy_lm, "Diagnosis: Acute pain of lung", "\nICD-10-CM category:")
    assert sum(form) / len(form) > -0.2
    code = logp(toy_lm, PROMPT, " A41")
    assert -8 < sum(code) / len(code) < -1  # it has learned codes, and not this answer
    foreign = logp(toy_lm, PROMPT, " elephant")
    assert sum(foreign) / len(foreign) < sum(code) / len(code) - 2


@pytest.mark.models
def test_it_answers_with_a_code_and_ends(toy_lm):
    ids = torch.tensor([toy_lm.encode_prompt(PROMPT)])
    made = toy_lm.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
    )[0, ids.shape[1] :].tolist()
    answer = toy_lm.decode(made).strip()
    assert len(answer) == 3
    assert answer[0].isalpha()
    assert answer[1:].isdigit()
    assert made[-1] in toy_lm.eos_ids


@pytest.mark.models
def test_the_gemma_has_sliding_layers_and_the_real_vocabularies_are_kept(cache_root):
    store = ModelStore(cache_root)
    llama, gemma = (load(store, ModelSpec(f"toy:{name}")) for name in ("llama", "gemma"))
    assert (llama.model.config.vocab_size, llama.bos) == (49_152, None)
    assert (gemma.model.config.vocab_size, gemma.bos) == (262_144, 2)
    assert gemma.model.config.layer_types[0] == "sliding_attention"


@pytest.mark.models
def test_the_same_parameters_give_the_same_weights(cache_root, tmp_path):
    store = ModelStore(cache_root)
    folder = store.folder("toy:llama")
    before = torch.random.get_rng_state()
    train_toy(toy.spec("llama"), folder, tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())
    weights = "model.safetensors"
    assert (tmp_path / weights).read_bytes() == (folder / weights).read_bytes()
