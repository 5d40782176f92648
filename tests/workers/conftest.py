"""Tiny random models with a byte-level tokenizer, made in a moment; nothing is downloaded."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from stillhouse.configs.stages import LoraConfig
from stillhouse.workers.adapter_training import adapter_parameters, put_adapter
from stillhouse.workers.models.language_model import LanguageModel, load
from stillhouse.workers.models.store import ModelStore
from stillhouse.workers.protocols import ModelSpec, TrainJob
from tests.workers import cache_models
from tests.workers.small_training import CONFIG, EXAMPLES

SPECIALS = {"eos_token": "<eos>", "pad_token": "<pad>", "bos_token": "<bos>"}
CONTEXT = 96
logging.disable_progress_bar()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: every text has tokens, and their number is known."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS.values()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIALS)


def write_model(kind: str, folder: Path, seed: int = 0) -> Path:
    """Write a random `llama` (no BOS) or `gemma` (sliding window, BOS, softcap) to `folder`."""
    tokenizer = byte_tokenizer()
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "initializer_range": 0.3,  # far from uniform, so that a mistake shows
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "llama":
            model: Any = LlamaForCausalLM(LlamaConfig(**common, head_dim=16))
        else:
            layers = ["sliding_attention", "sliding_attention", "full_attention"]
            gemma: dict[str, Any] = {"head_dim": 16, "sliding_window": 8, "layer_types": layers}
            config = Gemma3TextConfig(**common, **gemma, final_logit_softcapping=20.0)
            model = Gemma3ForCausalLM(config)
    model.generation_config.repetition_penalty = 9.0  # must not leak into what we generate
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: write_model(kind, root / kind) for kind in ("llama", "gemma")}


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> ModelStore:
    return ModelStore(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def llama(model_folders, store) -> LanguageModel:
    """Shared: tests must not change it."""
    return load(store, ModelSpec(str(model_folders["llama"])))


@pytest.fixture(scope="session")
def gemma(model_folders, store) -> LanguageModel:
    """Shared: tests must not change it."""
    return load(store, ModelSpec(str(model_folders["gemma"])))


@pytest.fixture(params=["llama", "gemma"])
def lm(request) -> LanguageModel:
    """Either of them in turn; shared."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=[cache_models.llama, cache_models.gemma], ids=["llama", "gemma"])
def model(request):
    """Fresh, with layers that a cache must know apart."""
    return request.param()


@pytest.fixture
def fresh(model_folders, store):
    """Loads a model of its own at each call: training wraps its layers."""

    def make(kind="llama"):
        return load(store, ModelSpec(str(model_folders[kind])))

    return make


@pytest.fixture
def job(model_folders, tmp_path):
    def make(folder="train", examples=EXAMPLES, kind="llama", **changes):
        config = CONFIG.model_copy(update=changes)
        return TrainJob(ModelSpec(str(model_folders[kind])), examples, config, tmp_path / folder)

    return make


@pytest.fixture
def specialist(model_folders, store):
    """A model with an adapter that is not zero."""
    fresh = load(store, ModelSpec(str(model_folders["llama"])))
    adapted = put_adapter(fresh.model, LoraConfig(rank=2), "ref", seed=0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter_parameters(adapted).values():
            parameter.normal_(std=0.3, generator=generator)
    return dataclasses.replace(fresh, model=adapted)
