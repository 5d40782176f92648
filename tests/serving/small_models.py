"""Models of random weights with heads of 64 channels, small enough for Triton's interpreter."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Olmo3Config, Olmo3ForCausalLM

SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2,
    "max_position_embeddings": 128, "initializer_range": 0.12, "tie_word_embeddings": True,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def save_llama(folder: Path) -> Path:
    """Two layers; two query heads share keys and values."""
    config = LlamaConfig(**SHAPE, num_hidden_layers=2, num_key_value_heads=1, head_dim=64)
    return _saved(LlamaForCausalLM, config, folder)


def save_olmo(folder: Path) -> Path:
    """Four layers; the first and the third see 16 tokens."""
    kinds = ["sliding_attention", "full_attention"] * 2
    config = Olmo3Config(**SHAPE, num_hidden_layers=4, sliding_window=16, layer_types=kinds)
    return _saved(Olmo3ForCausalLM, config, folder)


def _saved(kind: type[Any], config: Any, folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)
    return folder
