"""What a model's layers cache, from its configuration alone: heads, head sizes, windows.

Standard library only: a plan must not load torch. What a configuration leaves open is taken from
the family's defaults in transformers where they are listed here, and refused elsewhere: a guess
would be a wrong number that nobody sees.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.errors import ModelError
from stillhouse.workers.models import toy
from stillhouse.workers.models.gguf_header import GgufHeader, read_header
from stillhouse.workers.models.model_folder import read_json
from stillhouse.workers.models.refs import hub_folder, is_here, locate, parse

# By model_type without `_text`; what configurations on the hub leave out.
_DEFAULTS: dict[str, dict[str, int]] = {
    "gemma": {"head_dim": 256},
    "gemma2": {"head_dim": 256},
    "gemma3": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
    "gpt_oss": {"head_dim": 64},
    "qwen3": {"head_dim": 128},
}
_PATTERNS = {"cohere2": 4, "gemma2": 2, "gemma3": 6, "gemma3n": 5, "gpt_oss": 2, "olmo3": 4}
_ALL_SLIDE = {"ministral", "mistral", "mixtral", "phi3", "phimoe", "starcoder2"}
_WINDOW_SET = {"ministral", "mistral"}  # transformers' default is a window, so null must be written
_KV_HEADS = ("num_key_value_heads", "num_key_value_heads_per_layer", "num_kv_heads")

# Their full and sliding layers have heads of different sizes, by settings of their own.
_MIXED_HEADS = {"diffusion_gemma", "gemma4", "gemma4_unified", "mimo_v2_flash", "step3p7"}

# Settings that say that something else than keys and values of each token and head is cached.
_OTHER_CACHES = {
    "kv_lora_rank": "a latent cache (MLA)",
    "is_encoder_decoder": "an encoder, whose states are cached too",
    "cross_attention_layers": "cross-attention, whose states are cached too",
    "multi_query": "multi-query attention of an old kind",
    "block_configs": "layers of different kinds",
    "per_layer_config": "layers of different kinds",
    "global_head_dim": "full layers with heads of another size",
    "hybrid_layer_pattern": "layers of different kinds",
    "hybrid_override_pattern": "layers of different kinds",
    "swa_num_key_value_heads": "sliding layers with heads of their own",
    "layers_block_type": "recurrent layers",
    "block_types": "recurrent layers",
    "_block_types": "recurrent layers",
    "attn_type_list": "linear attention",
    "attn_layer_period": "state-space layers",
    "full_attention_interval": "linear attention",
    "linear_num_value_heads": "linear attention",
    "conv_L_cache": "convolutional layers",
    "mamba_d_state": "state-space layers",
    "ssm_cfg": "state-space layers",
    "ssm_state_size": "state-space layers",
    "state_size": "state-space layers",
    "compress_ratios": "compressed attention",
}


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer caches a token; `window` is None where attention sees every token."""

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None

    def stored(self, tokens: int) -> int:
        """Tokens kept after `tokens`: a sliding layer keeps window - 1, all its next step sees."""
        return tokens if self.window is None else min(tokens, self.window - 1)


@dataclass(frozen=True, slots=True)
class CacheShape:
    """The layers that have a cache of their own, and the context the model was made for."""

    name: str
    layers: tuple[LayerShape, ...]
    context: int | None


def read_cache_shape(ref: str) -> CacheShape:
    """The shape of any model reference, or of a config.json file alone.

    Raises ModelError for a model that is not here, and for one that caches something else.
    """
    path = Path(ref).expanduser()
    if path.suffix == ".json" and path.is_file():
        return cache_shape(read_json(path, ref), ref)
    parsed = parse(ref)
    if parsed.scheme == "peft":
        raise ModelError(f"{ref}: expected a whole model, found an adapter; name its base here")
    if parsed.scheme == "toy":
        return _toy_shape(parsed.body, ref)
    if parsed.scheme in {"gguf", "package"}:
        (file,) = locate(ref)
        return cache_shape(_settings_of(read_header(file.pieces[0])), ref)
    if not is_here(ref):
        raise ModelError(
            f"{ref}: expected its config.json in the hub cache, found none. Fetch that file alone: "
            f"hf download {parsed.body} config.json --revision {parsed.revision}"
        )
    folder = hub_folder(parsed) if parsed.scheme == "hf" else path
    if not folder.is_dir():
        locate(ref)  # says what was expected
    return cache_shape(read_json(folder / "config.json", ref), ref)


def cache_shape(config: Mapping[str, Any], name: str) -> CacheShape:
    """The shape that a config.json describes; ModelError names what is missing or unknown."""
    text = _text_part(config, name)
    _refuse_other_caches(text, name)
    family = _family(text)
    if family in _MIXED_HEADS:
        raise ModelError(
            f"{name}: expected heads of one size, found a {family}, whose full and sliding layers "
            "differ. The size of its cache is not known here"
        )
    settings = _Settings({**_DEFAULTS.get(family, {}), **_given(text)}, name)
    count = settings.size("num_hidden_layers", "num_transformer_layers")
    kinds = _kinds(settings, family, count)
    kinds = kinds[: count - settings.number("num_kv_shared_layers")]  # they read earlier layers'
    layers = tuple(_layer(settings, kind, index) for index, kind in enumerate(kinds))
    context = text.get("max_position_embeddings")
    return CacheShape(name, layers, context if _is_size(context) else None)


@dataclass(frozen=True, slots=True)
class _Settings:
    """A configuration's settings, each checked as it is read."""

    values: Mapping[str, Any]
    name: str

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def size(self, *keys: str, layer: int = 0) -> int:
        """The first of `keys` that is there, a positive number or a list of one a layer."""
        for key in keys:
            value = self.get(key)
            if isinstance(value, list):
                value = value[layer] if layer < len(value) else f"{len(value)} values"
            if _is_size(value):
                return int(value)
            if value is not None:
                raise self.refusal(f"a positive whole number as {key}", f"{value!r:.60}")
        raise self.refusal(f"{keys[0]} in its configuration", "none")

    def number(self, key: str) -> int:
        """A whole number from 0; 0 where there is none."""
        return self.size(key) if self.get(key) else 0

    def refusal(self, expected: str, found: str) -> ModelError:
        return ModelError(
            f"{self.name}: expected {expected}, found {found}. Give a config.json that says it"
        )


def _text_part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The language model's own settings, where others (vision, audio) lie beside them."""
    nested = config.get("text_config")
    if nested is None:
        return config
    if not isinstance(nested, dict):
        raise ModelError(
            f"{name}: expected an object as text_config, found {type(nested).__name__}. Fetch the "
            "configuration again"
        )
    return {"model_type": config.get("model_type"), **nested}


def _family(config: Mapping[str, Any]) -> str:
    return str(config.get("model_type")).removesuffix("_text")


def _given(config: Mapping[str, Any]) -> dict[str, Any]:
    """null means: as the class has it; of a window it means that there is none."""
    return {
        key: value for key, value in config.items() if value is not None or key == "sliding_window"
    }


def _refuse_other_caches(config: Mapping[str, Any], name: str) -> None:
    for key, what in _OTHER_CACHES.items():
        if config.get(key):
            raise ModelError(
                f"{name}: expected layers that cache keys and values of each head, found {what}: "
                f"{key} = {config[key]!r:.60}. The size of such a cache is not known here"
            )
    if config.get("use_bidirectional_attention") and config.get("sliding_window"):
        raise ModelError(
            f"{name}: expected causal attention, found use_bidirectional_attention = "
            f"{config['use_bidirectional_attention']!r}: such a model has no cache to plan"
        )


def _kinds(settings: _Settings, family: str, count: int) -> list[str]:
    """A word for each layer, as transformers derives `layer_types` where it is not written."""
    written = settings.get("layer_types")
    if written is not None:
        if not isinstance(written, list) or len(written) != count:
            raise settings.refusal(f"{count} words as layer_types", f"{written!r:.60}")
        return [str(kind) for kind in written]
    if family == "llama4":
        return _llama4_kinds(settings, count)
    if "sliding_window" not in settings.values and family in _WINDOW_SET:
        raise settings.refusal("sliding_window, a number or null", "none")
    pattern = _pattern(settings, family)
    if not settings.get("sliding_window") and pattern is None:
        return ["full_attention"] * count
    if family.startswith("qwen") or settings.get("use_sliding_window") is False:
        return _qwen_kinds(settings, count)
    if pattern is not None:
        return [_SLIDING if (index + 1) % pattern else _FULL for index in range(count)]
    if family in _ALL_SLIDE:
        return [_SLIDING] * count
    found = f"sliding_window = {settings.get('sliding_window')!r} alone"
    raise settings.refusal("layer_types, which say which layers slide", found)


_FULL, _SLIDING = "full_attention", "sliding_attention"


def _pattern(settings: _Settings, family: str) -> int | None:
    """Every so many layers one sees all tokens; None where nothing says so."""
    for key in ("sliding_window_pattern", "_sliding_window_pattern"):
        if settings.get(key) is not None:
            return settings.size(key)
    if "sliding_window" in settings.values and settings.get("sliding_window") is None:
        return None
    return _PATTERNS.get(family)


def _qwen_kinds(settings: _Settings, count: int) -> list[str]:
    if not settings.get("use_sliding_window"):
        return [_FULL] * count
    first = settings.size("max_window_layers") if settings.get("max_window_layers") != 0 else 0
    return [_SLIDING if index >= first else _FULL for index in range(count)]


def _llama4_kinds(settings: _Settings, count: int) -> list[str]:
    """Layers with rotary positions see their chunk, each fourth sees all tokens."""
    rotary = settings.get("no_rope_layers") or [(index + 1) % 4 for index in range(count)]
    if not isinstance(rotary, list) or len(rotary) != count:
        raise settings.refusal(f"{count} numbers as no_rope_layers", f"{rotary!r:.60}")
    return ["chunked_attention" if flag else _FULL for flag in rotary]


def _layer(settings: _Settings, kind: str, index: int) -> LayerShape:
    windows = {
        _FULL: None,
        _SLIDING: "sliding_window",
        "chunked_attention": "attention_chunk_size",
    }
    if kind not in windows:
        raise ModelError(
            f"{settings.name}: expected layers of {', '.join(windows)}, found {kind!r} as layer "
            f"{index}. The size of its cache is not known here"
        )
    key = windows[kind]
    head_dim = _head_dim(settings, index)
    return LayerShape(
        kv_heads=_kv_heads(settings, index),
        key_dim=head_dim,
        value_dim=settings.size("v_head_dim") if settings.get("v_head_dim") else head_dim,
        window=None if key is None else settings.size(key),
    )


def _kv_heads(settings: _Settings, index: int) -> int:
    if any(settings.get(key) is not None for key in _KV_HEADS):
        return settings.size(*_KV_HEADS, layer=index)
    if settings.get("model_type") == "llama":  # grouping came later: every query head has its own
        return settings.size("num_attention_heads")
    raise settings.refusal(f"{_KV_HEADS[0]} in its configuration", "none")


def _head_dim(settings: _Settings, index: int) -> int:
    if settings.get("head_dim") is not None:
        return settings.size("head_dim", layer=index)
    hidden, heads = settings.size("hidden_size"), settings.size("num_attention_heads")
    if hidden % heads:
        raise settings.refusal("head_dim, or heads that divide hidden_size", f"{hidden} / {heads}")
    return hidden // heads


def _toy_shape(body: str, name: str) -> CacheShape:
    made = toy.spec(body)
    sliding = made.layers - 1 if made.window else 0  # all but the last
    layers = tuple(
        LayerShape(
            made.kv_heads, made.head_dim, made.head_dim, made.window if index < sliding else None
        )
        for index in range(made.layers)
    )
    return CacheShape(name, layers, made.context)


def _settings_of(header: GgufHeader) -> dict[str, Any]:
    """The metadata of a GGUF file under the names of a config.json."""
    architecture = str(header.metadata.get("general.architecture"))

    def of(key: str) -> Any:
        return header.metadata.get(f"{architecture}.{key}")

    heads, kv_heads = of("attention.head_count"), of("attention.head_count_kv")
    found = {
        "model_type": architecture.replace("-", "_"),
        "num_hidden_layers": of("block_count"),
        "hidden_size": of("embedding_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads if kv_heads is None else kv_heads,
        "head_dim": of("attention.key_length"),
        "v_head_dim": of("attention.value_length"),
        "sliding_window": of("attention.sliding_window"),
        "sliding_window_pattern": of("attention.sliding_window_pattern"),
        "attention_chunk_size": of("attention.chunk_size"),
        "num_kv_shared_layers": of("attention.shared_kv_layers"),
        "kv_lora_rank": of("attention.kv_lora_rank"),
        "ssm_state_size": of("ssm.state_size"),
        "max_position_embeddings": of("context_length"),
    }
    return {key: value for key, value in found.items() if value is not None}


def _is_size(value: object) -> bool:
    # An array of a GGUF file is read as its length, of a class of its own: no size.
    return type(value) is int and value > 0
