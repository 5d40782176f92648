"""What a configuration says of a cache: against transformers, and what is refused."""

import json

import pytest
import transformers
from transformers.cache_utils import get_layer_types_and_kwargs

from stillhouse.errors import ModelError
from stillhouse.workers.models import toy
from stillhouse.workers.models.cache_shape import cache_shape, read_cache_shape
from tests.workers.small_gguf import write_small_gguf

BASE = {"num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 2}
PLAIN = BASE | {"hidden_size": 64, "model_type": "llama"}


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("Llama", {}),
        ("Mistral", {"sliding_window": 32}),
        ("Mistral", {"sliding_window": None}),
        ("Phi3", {"sliding_window": 32, "pad_token_id": 0}),
        ("Qwen2", {"sliding_window": 32}),
        ("Qwen2", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 5}),
        ("Qwen3", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 0}),
        ("Gemma2", {"sliding_window": 32}),
        ("Gemma3Text", {"sliding_window": 32}),
        ("Gemma3Text", {"sliding_window": 32, "sliding_window_pattern": 3}),
        ("Cohere2", {"sliding_window": 32}),
        ("GptOss", {"sliding_window": 32}),
        ("Olmo3", {"sliding_window": 32}),
        ("Gemma3nText", {"sliding_window": 32, "num_kv_shared_layers": 2}),
        ("Llama4Text", {"attention_chunk_size": 32}),
    ],
)
def test_layers_are_those_of_transformers(kind, more):
    """From the few settings given, and again from all that transformers writes."""
    made = getattr(transformers, f"{kind}Config")(**BASE, hidden_size=64, **more)
    _, options = get_layer_types_and_kwargs(made)
    windows = [option.get("sliding_window") for option in options]
    few = BASE | {"hidden_size": 64, "model_type": made.model_type} | more
    if kind in {"Gemma3nText", "Llama4Text"}:
        few["head_dim"] = made.head_dim
    for config in (few, made.to_dict()):
        layers = cache_shape(config, "model").layers
        assert [layer.window for layer in layers] == windows
        head_dim = getattr(made, "head_dim", None) or 64 // 4
        assert {(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in layers} == {
            (2, head_dim, head_dim)
        }


def test_a_language_model_inside_another():
    text = {"num_hidden_layers": 6, "hidden_size": 2560, "sliding_window": 1024}
    shape = cache_shape({"model_type": "gemma3", "text_config": text}, "model")
    assert [layer.window for layer in shape.layers] == [1024] * 5 + [None]
    assert {(layer.kv_heads, layer.key_dim) for layer in shape.layers} == {(4, 256)}


def test_heads_by_layer():
    config = PLAIN | {"num_hidden_layers": 3, "num_key_value_heads": [1, 2, 4]}
    assert [layer.kv_heads for layer in cache_shape(config, "model").layers] == [1, 2, 4]
    with pytest.raises(ModelError, match="num_key_value_heads, found '3 values'"):
        cache_shape(config | {"num_hidden_layers": 4}, "model")


def test_without_grouping_each_head_has_its_own():
    assert cache_shape(PLAIN | {"num_key_value_heads": None}, "m").layers[0].kv_heads == 4


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"kv_lora_rank": 512}, r"a latent cache \(MLA\): kv_lora_rank = 512"),
        ({"layer_types": ["linear_attention"] * 12}, "'linear_attention' as layer 0"),
        ({"layer_types": ["full_attention"] * 3}, "expected 12 words as layer_types"),
        ({"ssm_state_size": 16}, "state-space layers"),
        ({"is_encoder_decoder": True}, "an encoder"),
        ({"model_type": "gemma4_text"}, "found a gemma4"),
        ({"num_hidden_layers": "80"}, "positive whole number as num_hidden_layers, found '80'"),
        ({"num_hidden_layers": True}, "positive whole number as num_hidden_layers, found True"),
        ({"num_hidden_layers": None}, "expected num_hidden_layers in its configuration"),
        ({"num_attention_heads": 3}, "found 64 / 3"),
        ({"model_type": "new", "num_key_value_heads": None}, "expected num_key_value_heads in"),
        ({"model_type": "new", "sliding_window": 5}, "which say which layers slide"),
        ({"model_type": "mistral"}, "sliding_window, a number or null, found none"),
        ({"layer_types": ["sliding_attention"] * 12}, "expected sliding_window in"),
        ({"text_config": []}, "an object as text_config, found list"),
    ],
)
def test_what_is_not_known_is_refused(change, found):
    with pytest.raises(ModelError, match=f"^model: .*{found}"):
        cache_shape(PLAIN | change, "model")


def test_a_file_alone_and_its_folder(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PLAIN | {"max_position_embeddings": 99}))
    alone, folder = read_cache_shape(str(path)), read_cache_shape(str(tmp_path))
    assert alone.layers == folder.layers
    assert (alone.context, len(alone.layers)) == (99, 12)


def test_bad_references_are_named(tmp_path):
    (tmp_path / "config.json").write_text("[")
    for ref, found in [
        (str(tmp_path), "expected JSON"),
        (str(tmp_path / "none.json"), "found none"),
        ("nowhere/model", "nowhere/model"),
        ("toy:lama", "did you mean"),
        ("peft:adapter", "found an adapter"),
        (f"hf:some/model@{'0' * 40}", "hf download some/model config.json --revision 000"),
        (f"gguf:{write_small_gguf(tmp_path / 'small.gguf')}", "expected num_hidden_layers"),
    ]:
        with pytest.raises(ModelError, match=found):
            read_cache_shape(ref)


@pytest.mark.models
@pytest.mark.parametrize("ref", [toy.SMOLLM2, toy.GEMMA, "toy:llama", "toy:gemma"])
def test_a_header_says_what_the_converted_model_says(ref, cache_root):
    from stillhouse.workers.models.store import ModelStore

    folder = ModelStore(cache_root).folder(ref)
    found, converted = read_cache_shape(ref), read_cache_shape(str(folder))
    assert (found.layers, found.context) == (converted.layers, converted.context)
