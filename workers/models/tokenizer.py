"""Tokenizers, with what their conversion lost put back."""

from typing import TYPE_CHECKING

from stillhouse.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Families trained with <bos> before every text. Gemma's perplexity of plain English is 9.8 with it
# and 465 without it, and tokenizers converted from GGUF do not add it.
_FAMILIES_WITH_BOS = ("gemma",)


def wants_bos(model_type: str) -> bool:
    """Whether models of this `config.model_type` were trained with BOS before every text."""
    return model_type.startswith(_FAMILIES_WITH_BOS)


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether `tokenizer(text)` begins with BOS by itself."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a").input_ids)[:1] == [bos]


def continuation_lead(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A text to put before a continuation, so that its tokens are those it has inside a text.

    Tokenizers of the SentencePiece kind may put a blank before every text they are given (`a`
    becomes `▁a`): a response on its own would be cut as if a blank stood before it. To these a line
    break comes first, which no token shares with what follows; others need nothing.
    """
    ids = tokenizer("a", add_special_tokens=False).input_ids
    blank = str(tokenizer.convert_ids_to_tokens(ids[0])).startswith("▁") if ids else False
    return "\n" if blank else ""


def restore_bos(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Make `tokenizer(text)` begin with BOS, also after `save_pretrained` and a plain reload.

    The post-processor is part of tokenizer.json; the `add_bos_token` of tokenizer_config.json is
    read by some tokenizer classes only. Raises ModelError for a tokenizer without a BOS token.
    """
    from tokenizers.processors import TemplateProcessing

    if adds_bos(tokenizer):
        return
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    if bos is None or bos_id is None:
        raise ModelError(
            "expected a tokenizer with a BOS token, because this model was trained with one before "
            'every text; found none. Add "bos_token" to tokenizer_config.json'
        )
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, bos_id)],
    )
    if not adds_bos(tokenizer):
        raise ModelError(
            f"expected {type(tokenizer).__name__} to begin a text with {bos!r} after repair; it "
            "does not. Use a tokenizer with a tokenizer.json"
        )


def require_eos(tokenizer: "PreTrainedTokenizerBase", name: str, config_eos: object) -> int:
    """Return the EOS id; raises ModelError when the tokenizer names none."""
    eos = tokenizer.eos_token_id
    if isinstance(eos, int):
        return eos
    first = config_eos[0] if isinstance(config_eos, list) else config_eos
    hint = "the token that ends a text"
    if isinstance(first, int):
        hint = f"{tokenizer.convert_ids_to_tokens(first)!r}, id {first} of its config.json"
    raise ModelError(
        f"{name}: expected a tokenizer with an end-of-sequence token, found none: a student could "
        f'not learn where an answer ends. Set "eos_token" in its tokenizer_config.json ({hint})'
    )
