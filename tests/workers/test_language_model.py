"""Language models: special tokens, adapters that do and do not fit, decoder and head."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
)

from stillhouse.errors import ModelError
from stillhouse.workers.models import toy
from stillhouse.workers.models.adapter_loading import attach_adapter
from stillhouse.workers.models.language_model import (
    Head,
    LanguageModel,
    check_projection,
    decoder_and_head,
    load,
    load_codec,
)
from stillhouse.workers.models.store import ModelStore
from stillhouse.workers.models.tokenizer import continuation_lead, restore_bos
from stillhouse.workers.protocols import ModelSpec

ENGLISH = (
    "The weather was fine that morning, so we walked along the river to the old mill. The miller's "
    "daughter told us that the bridge had been closed since the storm, and that we should take the "
    "road through the village instead."
)


@pytest.fixture
def copied(model_folders, tmp_path):
    """A copy of the tiny llama that a test may damage."""
    return shutil.copytree(model_folders["llama"], tmp_path / "model")


@pytest.fixture
def adapter(model_folders, store, tmp_path):
    """A LoRA adapter of the tiny llama that changes what it says."""
    model = load(store, ModelSpec(str(model_folders["llama"]))).model
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def logits(lm: LanguageModel, ids: list[int]) -> torch.Tensor:
    row = torch.tensor([ids])
    with torch.no_grad():
        return lm.model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0]


def perplexity(lm: LanguageModel, ids: list[int], targets: int) -> float:
    logp = logits(lm, ids).log_softmax(-1)[:-1]
    taken = logp.gather(1, torch.tensor(ids[1:])[:, None])[-targets:]
    return math.exp(-float(taken.mean()))


def edit(path, **changes):
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def test_bos_comes_exactly_once_where_the_model_wants_it(gemma, llama):
    bos = gemma.tokenizer.bos_token_id
    assert gemma.bos == bos
    assert gemma.encode_prompt("hi") == [bos, *gemma.encode_response("hi")]
    assert gemma.encode_prompt("<bos>hi") == gemma.encode_prompt("hi")
    assert gemma.encode_prompt("") == [bos]
    assert llama.bos is None
    assert llama.encode_prompt("hi") == llama.encode_response("hi")


def test_a_response_has_no_special_tokens_and_decodes_to_itself(lm):
    ids = lm.encode_response(" E11 – naïve\n")
    assert not set(ids) & {lm.bos, *lm.eos_ids}
    assert lm.decode(ids) == " E11 – naïve\n"
    assert lm.decode([*ids, *lm.eos_ids]) == " E11 – naïve\n"


def test_a_response_ends_where_its_tokens_do(lm):
    text = " E11 – naïve 𝔘 ok\n"
    [ends, none], ids = lm.response_ends([text, ""]), lm.encode_response(text)
    assert none == []
    assert len(ends) == len(ids)
    assert ends == sorted(ends)
    assert ends[-1] == len(text)
    for place, end in enumerate(ends):  # a character of several tokens ends with the first
        last = place + 1 == len(ends) or ends[place + 1] > end
        if last:
            assert lm.decode(ids[: place + 1]).lstrip() == text[:end].lstrip()


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("ab", ["ab"]),
        (" ab", ["▁ab"]),
        ("  ab", ["▁", "▁ab"]),
        ("\nab", ["<0x0A>", "ab"]),
        ("", []),
    ],
)
def test_a_response_is_cut_as_inside_a_text_where_texts_get_a_blank(llama, response, expected):
    # A Llama 2 tokenizer in small: `ab` alone is `▁ab`, as ` ab` is inside a text.
    words = ["<unk>", "▁", "a", "b", "ab", "▁ab", "<0x0A>", "</s>"]
    model = models.BPE(
        vocab={word: place for place, word in enumerate(words)},
        merges=[("a", "b"), ("▁", "ab")],
        unk_token="<unk>",
        byte_fallback=True,
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>"
    )
    codec = dataclasses.replace(llama, tokenizer=tokenizer, lead=continuation_lead(tokenizer))
    assert codec.encode_prompt("ab") == [words.index("▁ab")]
    found = [words[token] for token in codec.encode_response(response)]
    assert found == expected
    whole = [word.replace("▁", " ").replace("<0x0A>", "\n") for word in expected]
    [ends] = codec.response_ends([response])
    assert ends == [len("".join(whole[: n + 1])) for n in range(len(whole))]


def test_a_repaired_tokenizer_stays_repaired_after_saving(gemma, tmp_path):
    gemma.tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("hi").input_ids == gemma.encode_prompt("hi")
    restore_bos(again)
    assert again("hi").input_ids == gemma.encode_prompt("hi")


def test_every_eos_of_the_configurations_counts(copied, store):
    edit(copied / "generation_config.json", eos_token_id=[3, 4])
    codec = load_codec(store, str(copied))
    assert codec.eos_ids == (codec.tokenizer.eos_token_id, 3, 4)


def test_a_tokenizer_without_eos_is_refused_with_the_cure(copied, store):
    edit(copied / "tokenizer_config.json", eos_token=None)
    with pytest.raises(
        ModelError, match=r'end-of-sequence .* Set "eos_token" in .*<eos>.*, id 256'
    ):
        load_codec(store, str(copied))


def test_a_tokenizer_without_bos_cannot_serve_a_gemma(model_folders, store, tmp_path):
    folder = shutil.copytree(model_folders["gemma"], tmp_path / "model")
    edit(folder / "tokenizer_config.json", bos_token=None)
    with pytest.raises(ModelError, match="expected a tokenizer with a BOS token"):
        load_codec(store, str(folder))


def test_weights_cut_short_are_refused(copied, store):
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="expected a causal language model in whole safetensors"):
        load(store, ModelSpec(str(copied)))


def test_an_adapter_acts_and_can_be_switched_off(model_folders, store, llama, adapter):
    specialist = load(store, ModelSpec(str(model_folders["llama"]), adapter))
    # Before it is switched off and on: PEFT then makes an adapter trainable again.
    assert not any(parameter.requires_grad for parameter in specialist.model.parameters())
    ids = llama.encode_prompt("some text")
    assert not torch.allclose(logits(specialist, ids), logits(llama, ids))
    with specialist.model.disable_adapter():
        assert torch.equal(logits(specialist, ids), logits(llama, ids))


def test_an_adapter_of_another_size_names_the_tensor_and_both_shapes(model_folders, store, adapter):
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("q_proj.lora_A.weight"))
    tensors[name] = torch.zeros(4, 40)
    save_file(tensors, weights)
    pattern = r"0.self_attn.q_proj.lora_A.weight expected shape \(4, 32\) .* found \(4, 40\)"
    with pytest.raises(ModelError, match=pattern):
        load(store, ModelSpec(str(model_folders["llama"]), adapter))


def test_an_adapter_of_another_architecture_names_the_module(model_folders, store, adapter):
    weights = adapter / "adapter_model.safetensors"
    tensors = {name.replace("self_attn", "attention"): t for name, t in load_file(weights).items()}
    save_file(tensors, weights)
    with pytest.raises(ModelError, match=r"'model.layers.0.attention.q_proj' that the base"):
        load(store, ModelSpec(str(model_folders["llama"]), adapter))


def test_an_adapter_that_fills_only_a_part_of_its_modules_is_refused(model_folders, store, adapter):
    weights = adapter / "adapter_model.safetensors"
    tensors = {name: t for name, t in load_file(weights).items() if "layers.2." not in name}
    save_file(tensors, weights)
    with pytest.raises(
        ModelError, match=r"asks for 4 tensors .* does not hold, the first .*layers.2"
    ):
        load(store, ModelSpec(str(model_folders["llama"]), adapter))


def test_a_pickled_a_cut_and_a_missing_adapter_are_refused(model_folders, store, adapter):
    spec = ModelSpec(str(model_folders["llama"]), adapter)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ModelError, match="cut short"):
        load(store, spec)
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"found only adapter_model.bin, a pickle"):
        load(store, spec)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match=r"expected adapter_config.json"):
        load(store, spec)


def test_decoder_and_head_give_the_models_own_logits(lm):
    ids = torch.tensor([lm.encode_prompt("some text")])
    decoder, head = decoder_and_head(lm.model)
    with torch.no_grad():
        hidden = decoder(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
        found = head.logits(hidden, torch.float32)
    assert (head.softcap is not None) == (lm.bos is not None)  # only the tiny gemma has one
    assert head.bias_V is None
    torch.testing.assert_close(found, logits(lm, ids[0].tolist()))


def test_logits_of_a_head_by_hand():
    hidden, weight = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    bias = torch.tensor([-2.0, 4.0])
    assert Head(weight).logits(hidden, torch.float64).tolist() == [[2.0, 3.0]]
    assert Head(weight, bias).logits(hidden, torch.float32).tolist() == [[0.0, 7.0]]
    capped = Head(weight, bias, 2.0).logits(hidden, torch.float64)
    assert capped[0].tolist() == pytest.approx([0.0, 2 * math.tanh(3.5)])


def test_a_head_with_a_bias_is_loaded(model_folders, store, tmp_path):
    folder = shutil.copytree(model_folders["llama"], tmp_path / "phi")
    config = PhiConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=96, initializer_range=0.3,
        pad_token_id=257, bos_token_id=258, eos_token_id=256,
    )  # fmt: skip
    model = PhiForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.bias, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    lm = load(store, ModelSpec(str(folder)))
    decoder, head = decoder_and_head(lm.model)
    assert head.bias_V is not None
    assert torch.equal(head.bias_V, model.lm_head.bias)
    ids = lm.encode_prompt("some text")
    found = head.logits(decoder(input_ids=torch.tensor([ids]))[0], torch.float32)
    torch.testing.assert_close(found, logits(lm, ids), atol=1e-5, rtol=1e-5)


def test_decoder_and_head_see_the_adapter(model_folders, store, adapter):
    lm = load(store, ModelSpec(str(model_folders["llama"]), adapter))
    ids = torch.tensor([lm.encode_prompt("some text")])
    decoder, head = decoder_and_head(lm.model)
    with torch.no_grad():
        hidden = decoder(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
    found = head.logits(hidden, torch.float32)
    torch.testing.assert_close(found, logits(lm, ids[0].tolist()))


def test_a_head_that_is_more_than_a_product_and_a_bias_is_refused(model_folders, store):
    lm = load(store, ModelSpec(str(model_folders["llama"])))
    wrapped = get_peft_model(lm.model, LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ModelError, match="an adapter on its head"):
        decoder_and_head(wrapped)
    lm.model.config.logits_scaling = 8.0
    with pytest.raises(ModelError, match="logits_scaling"):
        decoder_and_head(lm.model)


@pytest.mark.models
def test_the_real_gemma_gets_its_bos_back_and_needs_it(cache_root):
    store = ModelStore(cache_root)
    plain = AutoTokenizer.from_pretrained(store.folder(toy.GEMMA))
    assert plain("hi").input_ids[0] == 2
    lm = load(store, ModelSpec(toy.GEMMA))
    ids = lm.encode_prompt(ENGLISH)
    assert ids[:2] == [2, lm.encode_response(ENGLISH)[0]]
    without = ids[1:]
    assert perplexity(lm, ids, len(without) - 1) < 25
    assert perplexity(lm, without, len(without) - 1) > 100
    assert (lm.bos, lm.eos_ids, lm.context) == (2, (1,), 32_768)


@pytest.mark.models
def test_the_real_smollm2_needs_no_bos_and_pads_with_its_eos(cache_root):
    lm = load(ModelStore(cache_root), ModelSpec(toy.SMOLLM2))
    assert (lm.bos, lm.eos_ids, lm.pad, lm.context) == (None, (2,), 2, 8192)
    ids = lm.encode_prompt(ENGLISH)
    assert perplexity(lm, ids, len(ids) - 1) < 25
    assert lm.decode(ids) == ENGLISH


def test_a_weight_that_is_missing_is_refused_and_not_made_up(copied, store):
    path = copied / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"found 1 missing, the first .*layers\.1\.mlp\.up_proj"):
        load(store, ModelSpec(str(copied)))


def test_a_weight_of_another_shape_is_refused(copied, store):
    path = copied / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="expected a causal language model"):
        load(store, ModelSpec(str(copied)))


def test_the_code_of_a_tokenizer_is_not_run(copied, store):
    path = copied / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"tokenizer_class": "OddTokenizer", "auto_map": {"AutoTokenizer": ["odd.Odd", None]}}
    path.write_text(json.dumps(config))
    (copied / "odd.py").write_text(f"open({str(copied / 'ran')!r}, 'w')\nclass Odd: pass\n")
    with pytest.raises(ModelError, match="of a kind that transformers has itself"):
        load_codec(store, str(copied))
    assert not (copied / "ran").exists()


@pytest.mark.parametrize("damage", ["{broken", "{}"])
def test_a_damaged_tokenizer_is_refused(copied, store, damage):
    (copied / "tokenizer.json").write_text(damage)
    with pytest.raises(ModelError, match="expected a tokenizer and a configuration"):
        load_codec(store, str(copied))


def test_tensors_that_an_adapter_would_leave_out_are_refused(model_folders, store, adapter):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["q_proj"]}))
    with pytest.raises(ModelError, match=r"does not ask for, the first .*down_proj"):
        load(store, ModelSpec(str(model_folders["llama"]), adapter))


@pytest.mark.parametrize("change", [{"r": 8}, {"peft_type": "ODD"}])
def test_an_adapter_with_a_wrong_configuration_is_refused(model_folders, store, adapter, change):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match="expected a configuration that fits"):
        load(store, ModelSpec(str(model_folders["llama"]), adapter))


def test_logits_that_are_more_than_the_product_are_refused(fresh):
    model = fresh("gemma").model
    check_projection(model)
    head = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 1.01 * head(hidden)
    with pytest.raises(ModelError, match="it scales or caps them"):
        check_projection(model)


def test_an_adapter_on_modules_that_are_not_linear_fits_or_is_refused(tmp_path):
    def model(width):
        sizes = {"n_layer": 1, "n_head": 2, "n_embd": width, "vocab_size": 16, "n_positions": 8}
        config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
        return GPT2LMHeadModel(config).eval()

    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    wrapped = get_peft_model(model(8), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    wrapped.save_pretrained(tmp_path)
    attached = attach_adapter(model(8), tmp_path)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            assert torch.equal(attached.get_parameter(name), parameter)
    with pytest.raises(ModelError, match=r"(?s)a configuration that fits .*size mismatch"):
        attach_adapter(model(16), tmp_path)
