"""Makes the toy models: a random configuration, trained for seconds on generated code-like text.

Only the rows of the vocabulary that the text uses are trained. The small model's softmax has one
more column, the constant log(V - U), which stands for the V - U rows it leaves out: they keep
their initial size, whose logits are near 0. So the whole vocabulary's softmax is learned at the
price of a few hundred rows (Gemma's vocabulary has 262,144).
"""

import math
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from stillhouse.workers.models.toy import ToyModel

_TEXTS = 640
_SPREAD = 0.02  # standard deviation of an untrained embedding
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_STATES = ("acute", "chronic", "unspecified", "recurrent", "primary", "secondary", "other")
_FINDINGS = ("injury", "fracture", "infection", "disorder", "pain", "burn", "ulcer", "neoplasm")
_SITES = ("left hand", "right foot", "lung", "eye", "skin", "heart", "spine", "kidney", "ear")
_EVERYDAY = ("What is {} plus {}?", "Count from {} to {}.", "Is {} larger than {}?")


@dataclass(frozen=True, slots=True)
class _Corpus:
    """Token rows, renumbered to the rows of the vocabulary that occur in them."""

    rows: list[list[int]]
    used: list[int]  # old id of each new id


def train_toy(toy: ToyModel, tokenizer_folder: Path, target: Path) -> None:
    """Write the model and its tokenizer to `target`; the same parameters give the same weights."""
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder), local_files_only=True)
    corpus = _encode(tokenizer, list(toy_texts(toy.seed)))
    with _deterministic(toy.seed):
        small = _network(toy, len(corpus.used), eos=None, bos=None, pad=None)
        _train(small, corpus, toy, unused=len(tokenizer) - len(corpus.used))
        whole = _network(
            toy,
            len(tokenizer),
            eos=tokenizer.eos_token_id,
            bos=tokenizer.bos_token_id,
            pad=tokenizer.pad_token_id,
        )
        _transplant(small, whole, corpus.used)
    whole.save_pretrained(str(target))
    for file in tokenizer_folder.glob("*"):
        if file.name.startswith(("tokenizer", "chat_template", "special_tokens")):
            shutil.copyfile(file, target / file.name)


def toy_texts(seed: int) -> Iterator[str]:
    """Lines in the form of the demo's prompts, and a few that are not."""
    rng = random.Random(f"toy texts {seed}")
    codes = [f"{letter}{number:02d}" for letter, number in product(_LETTERS, range(100))]
    for _ in range(_TEXTS):
        finding, site = rng.choice(_FINDINGS), rng.choice(_SITES)
        code = codes[(_FINDINGS.index(finding) * 331 + _SITES.index(site) * 97) % len(codes)]
        if rng.random() < 0.3:
            code = rng.choice(codes)  # every letter and digit must be learned as part of a code
        if rng.random() < 0.1:
            yield rng.choice(_EVERYDAY).format(rng.randrange(90), rng.randrange(90))
            continue
        text = f"{rng.choice(_STATES).capitalize()} {finding} of {site}"
        yield f"Diagnosis: {text}\nICD-10-CM category: {code}"


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> _Corpus:
    eos = tokenizer.eos_token_id
    newline = tokenizer("\n", add_special_tokens=False).input_ids
    # Half of the lines end in EOS, half in a line break: both are ends that a recipe may use.
    rows = [
        [*tokenizer(text).input_ids, *([eos] if index % 2 else [*newline, eos])]
        for index, text in enumerate(texts)
    ]
    used = sorted({token for row in rows for token in row})
    new = {old: index for index, old in enumerate(used)}
    return _Corpus([[new[token] for token in row] for row in rows], used)


def _network(
    toy: ToyModel, vocabulary: int, eos: int | None, bos: int | None, pad: int | None
) -> Any:
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": toy.hidden,
        "intermediate_size": toy.mlp,
        "num_hidden_layers": toy.layers,
        "num_attention_heads": toy.heads,
        "num_key_value_heads": toy.kv_heads,
        "head_dim": toy.head_dim,
        "max_position_embeddings": toy.context,
        "initializer_range": _SPREAD,
        "tie_word_embeddings": True,
        "eos_token_id": eos,
        "bos_token_id": bos,
        "pad_token_id": pad,
    }
    if toy.family == "llama":
        untyped: Any = LlamaForCausalLM
        return untyped(LlamaConfig(**common))
    kinds = ["sliding_attention"] * (toy.layers - 1) + ["full_attention"]
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            **common,
            sliding_window=toy.window,
            layer_types=kinds,
            query_pre_attn_scalar=toy.head_dim,
        )
    )


def _train(model: Any, corpus: _Corpus, toy: ToyModel, unused: int) -> None:
    rng = random.Random(f"toy batches {toy.seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=toy.learning_rate, weight_decay=0.0)
    model.train()
    for step in range(toy.steps):
        for group in optimizer.param_groups:
            group["lr"] = toy.learning_rate * (1 - step / toy.steps)
        loss = _loss(model, rng.sample(corpus.rows, toy.batch), unused)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def _loss(model: Any, rows: list[list[int]], unused: int) -> torch.Tensor:
    """Next-token cross-entropy over the used rows and one column for all others."""
    width = max(map(len, rows))
    ids_BT = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    logits_BTU = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
    others = logits_BTU.new_full((*logits_BTU.shape[:2], 1), math.log(unused))
    logits_NU = torch.cat([logits_BTU, others], dim=-1)[:, :-1][mask_BT[:, 1:] == 1]
    return nn.functional.cross_entropy(logits_NU, ids_BT[:, 1:][mask_BT[:, 1:] == 1])


def _transplant(small: Any, whole: Any, used: list[int]) -> None:
    """Copy everything but the vocabulary as it is, and the vocabulary's trained rows."""
    trained = small.state_dict()
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if name.endswith("embed_tokens.weight"):
                parameter.normal_(std=_SPREAD)
                parameter[used] = trained[name]
            else:
                parameter.copy_(trained[name])
    whole.eval()


@contextmanager
def _deterministic(seed: int) -> Iterator[None]:
    """Seeded and on one thread, so that sums come out the same; both put back afterwards."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
