"""A causal language model with its tokenizer, and what one must know to feed it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stillhouse.errors import ModelError
from stillhouse.workers.models.model_folder import refuse_missing_weights
from stillhouse.workers.models.refs import parse
from stillhouse.workers.models.store import ModelStore
from stillhouse.workers.models.tokenizer import (
    adds_bos,
    continuation_lead,
    require_eos,
    restore_bos,
    wants_bos,
)
from stillhouse.workers.protocols import ModelSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# Scalings of the logits that `decoder_and_head` would lose.
_SCALED_LOGITS = ("logits_scaling", "logit_scale")


@dataclass(frozen=True, slots=True)
class TextCodec:
    """Text to ids and back. `bos` is the id every text begins with, None where there is none.

    `pad` may equal an EOS id (SmolLM2): build attention masks from lengths, never from ids.
    """

    tokenizer: "PreTrainedTokenizerBase"
    bos: int | None
    eos_ids: tuple[int, ...]  # the tokenizer's first
    pad: int
    context: int  # tokens
    name: str
    lead: str  # put before a continuation and cut off again: see `continuation_lead`

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt, with BOS exactly once where the model was trained with it."""
        return self.encode_prompts([text])[0]

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several prompts, each as `encode_prompt` gives them."""
        rows = self.tokenizer(list(texts), add_special_tokens=False).input_ids
        bos = [] if self.bos is None else [self.bos]
        return [list(ids) if ids[:1] == bos else [*bos, *ids] for ids in rows]

    def encode_response(self, text: str) -> list[int]:
        """Ids of a continuation, as they follow on a prompt: no BOS, no EOS, no blank added."""
        ids = self.tokenizer(self.lead + text, add_special_tokens=False).input_ids
        if not self.lead:
            return list(ids)
        return list(ids[len(self.tokenizer(self.lead, add_special_tokens=False).input_ids) :])

    def response_ends(self, texts: Sequence[str]) -> list[list[int]]:
        """Where each token of `encode_response` ends in its text, in characters.

        Empty lists of a tokenizer that cannot tell: one without a Rust backend.
        """
        if not texts or not self.tokenizer.is_fast:
            return [[] for _ in texts]
        begin = len(self.lead)
        lead = len(self.tokenizer(self.lead, add_special_tokens=False).input_ids) if begin else 0
        made = self.tokenizer(
            [self.lead + text for text in texts],
            add_special_tokens=False,
            return_offsets_mapping=True,
        )
        return [[max(end - begin, 0) for _, end in row[lead:]] for row in made.offset_mapping]

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens left out."""
        text = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


@dataclass(frozen=True, slots=True)
class LanguageModel(TextCodec):
    """A codec and the network it feeds: `model` is frozen and in eval mode, in PEFT's wrapper
    where it has an adapter.
    """

    model: Any


@dataclass(frozen=True, slots=True)
class Head:
    """From hidden states to logits: a product with weight_VD, a bias and a soft cap, or None."""

    weight_VD: "torch.Tensor"
    bias_V: "torch.Tensor | None" = None
    softcap: float | None = None

    def logits(self, hidden_TD: "torch.Tensor", dtype: "torch.dtype") -> "torch.Tensor":
        """softcap·tanh((W h + b) / softcap), [T, V] in `dtype`; the product is in the weight's."""
        logits_TV = (hidden_TD @ self.weight_VD.T).to(dtype)
        if self.bias_V is not None:
            logits_TV = logits_TV + self.bias_V.to(dtype)
        if self.softcap is not None:
            logits_TV = self.softcap * (logits_TV / self.softcap).tanh()
        return logits_TV


class DecoderHead(NamedTuple):
    """A causal model in two halves, so that callers project only where they need logits.

    `decoder(input_ids=…, attention_mask=…, …)` returns the last hidden states (B, T, D), after the
    final norm. A cache passed as `past_key_values` is filled in place.
    """

    decoder: Callable[..., "torch.Tensor"]
    head: Head


def load(
    store: ModelStore, spec: ModelSpec, device: str = "cpu", dtype: str = "float32"
) -> LanguageModel:
    """Load a model, with its adapter where the spec has one; raises ModelError when they misfit."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    folder = store.folder(spec.ref)
    codec = load_codec(store, spec.ref)
    try:
        made: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{spec.ref}: expected a causal language model in whole safetensors in {folder}, "
            f"found: {error}. Fetch it again, or delete the folder if it is a converted copy"
        ) from error
    model, found = made
    refuse_missing_weights(found, spec.ref)
    check_projection(model)
    if spec.adapter is not None:
        from stillhouse.workers.models.adapter_loading import attach_adapter

        model = attach_adapter(model, spec.adapter)
    return LanguageModel(
        tokenizer=codec.tokenizer,
        bos=codec.bos,
        eos_ids=codec.eos_ids,
        pad=codec.pad,
        context=codec.context,
        name=codec.name,
        lead=codec.lead,
        model=model.to(device).eval().requires_grad_(False),
    )


def load_codec(store: ModelStore, ref: str) -> TextCodec:
    """The tokenizer of a model, repaired, without its weights."""
    from transformers import AutoConfig, AutoTokenizer

    folder = store.folder(ref)
    name = parse(ref).name
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(str(folder), **options).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **options)
        context = int(config.max_position_embeddings)
    except (ValueError, OSError, AttributeError, KeyError, TypeError) as error:
        raise ModelError(
            f"{ref}: expected a tokenizer and a configuration with max_position_embeddings in "
            f"{folder}, of a kind that transformers has itself; found: {error}"
        ) from error
    if wants_bos(config.model_type):
        restore_bos(tokenizer)
    eos = require_eos(tokenizer, name, config.eos_token_id)
    pad = tokenizer.pad_token_id
    return TextCodec(
        tokenizer=tokenizer,
        bos=tokenizer.bos_token_id if adds_bos(tokenizer) else None,
        eos_ids=_eos_ids(eos, config.eos_token_id, folder),
        pad=pad if isinstance(pad, int) else eos,
        context=context,
        name=name,
        lead=continuation_lead(tokenizer),
    )


def _eos_ids(eos: int, configured: int | list[int] | None, folder: Path) -> tuple[int, ...]:
    """The tokenizer's EOS, then those of the configurations: chat models end a turn with others."""
    from transformers import GenerationConfig

    ids = [eos]
    for value in (configured, _generation_eos(folder, GenerationConfig)):
        ids += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(ids))


def _generation_eos(folder: Path, kind: Any) -> int | list[int] | None:
    if not (folder / "generation_config.json").is_file():
        return None
    found: int | list[int] | None = kind.from_pretrained(str(folder)).eos_token_id
    return found


def check_projection(model: Any) -> None:
    """ModelError unless the logits are what `decoder_and_head` makes of the hidden states."""
    import torch

    ids = torch.arange(3).unsqueeze(0)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
        decoder, head = decoder_and_head(model)
        ours = head.logits(decoder(input_ids=ids), logits.dtype)
    slack = 256 * torch.finfo(logits.dtype).eps * float(logits.nan_to_num().abs().max())
    if not torch.allclose(ours, logits, rtol=0, atol=slack, equal_nan=True):
        raise ModelError(
            f"{type(model).__name__}: expected logits = head x hidden state + bias, found others: "
            "it scales or caps them in a way that the chunked projection does not know. Use "
            "another model"
        )


def decoder_and_head(model: Any) -> DecoderHead:
    """Split a causal model, through a PEFT wrapper, into its decoder and its head.

    Raises ModelError where logits are more than what `Head` makes of the last hidden state.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings()
    config = base.config.get_text_config()
    odd = [name for name in _SCALED_LOGITS if getattr(config, name, None) not in (None, 1.0)]
    if hasattr(head, "lora_A"):
        odd.append("an adapter on its head")
    if odd:
        raise ModelError(
            f"{type(base).__name__}: expected logits = head x hidden state + bias, found {odd[0]}, "
            "which the chunked projection does not know. Leave it out, or use another model"
        )
    softcap = getattr(config, "final_logit_softcapping", None)
    decoder = base.get_decoder()

    def hidden(**inputs: Any) -> "torch.Tensor":
        states: torch.Tensor = decoder(**inputs).last_hidden_state
        return states

    return DecoderHead(hidden, Head(head.weight, getattr(head, "bias", None), softcap))
