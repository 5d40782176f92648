"""Small models with full and sliding layers, and what a test of their cache feeds them."""

import copy
import dataclasses
import math
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from stillhouse.workers.models.language_model import LanguageModel

VOCABULARY, WINDOW, HEADS, HEAD_DIM = 50, 8, 2, 16
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def llama(head_dim=HEAD_DIM):
    torch.manual_seed(0)
    sizes = SIZES | {"head_dim": head_dim}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, initializer_range=0.2, **sizes)).eval()


def gemma(window=WINDOW, head_dim=HEAD_DIM):
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        num_hidden_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=window,
        initializer_range=0.2,
        **SIZES | {"head_dim": head_dim},
    )
    return Gemma3ForCausalLM(config).eval()


def gemma2(window=WINDOW, head_dim=HEAD_DIM):
    """With capped attention scores."""
    torch.manual_seed(0)
    config = Gemma2Config(
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=window,
        attn_logit_softcapping=2.0,
        query_pre_attn_scalar=head_dim,
        initializer_range=0.2,
        **SIZES | {"head_dim": head_dim},
    )
    return Gemma2ForCausalLM(config).eval()


def tokens(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


@torch.no_grad()
def step_logits(model, ids, cache, pieces):
    """Logits of every token, `ids` fed in `pieces` of the given lengths through one cache."""
    out, start = [], 0
    for piece in pieces:
        out.append(model(ids[:, start : start + piece], past_key_values=cache).logits)
        start += piece
    return torch.cat(out, dim=1)


def random_kv(batch, length, seed=0):
    shape = (batch, HEADS, length, HEAD_DIM)
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))


def with_nan_embedding(lm: LanguageModel, letter: str) -> LanguageModel:
    """A copy that gives no number once it has read the letter."""
    broken: Any = copy.deepcopy(lm.model)
    with torch.no_grad():
        broken.model.embed_tokens.weight[lm.encode_response(letter)] = math.nan
    return dataclasses.replace(lm, model=broken)
