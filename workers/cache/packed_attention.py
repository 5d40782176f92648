"""Attention of a generated token straight from the packed cache.

    model.set_attn_implementation(PACKED_ATTENTION)
    model.generate(**batch, past_key_values=TurboQuantCache(config, scheme, attend_packed=True))

Prompts, and caches that no packed kernel reads, are decoded for transformers' `sdpa` as ever. A
generated token's keys and values reach the attention as `PackedStates`, which any other attention
refuses. Tokens in 16 bits (sinks, recent ones) meet the packed ones in one softmax. A CPU reads
records (`cpu_attention`), a GPU pages (`gpu_attention`).

Shape suffixes: B sequences, H key/value heads, G query heads of each, T tokens, D head size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from stillhouse.kernels.paged_attention import FP8
from stillhouse.kernels.paged_attention.refusals import LEAST_DIM, LEAST_RECORDS
from stillhouse.kernels.turboquant import FittedCodec, Fp8Codec, MseCodec
from stillhouse.workers.cache.cpu_attention import attend_rows
from stillhouse.workers.cache.gpu_attention import attend_pages
from stillhouse.workers.cache.page_storage import PageStorage
from stillhouse.workers.cache.rows import Rows

PACKED_ATTENTION = "stillhouse_packed"


class PackedStates(Tensor):
    """A new token's keys or values [B, H, 1, D], and the cache that they belong to.

    rows: what is stored of keys and of values, the new ones included. span: the slots [first, end)
    that the token sees.
    """

    rows: tuple[Rows, ...]
    span: tuple[int, int]

    @classmethod
    def of(
        cls, states: Sequence[Tensor], rows: tuple[Rows, ...], span: tuple[int, int]
    ) -> "tuple[PackedStates, PackedStates] | None":
        """For keys and values; None where no packed kernel reads the cache."""
        if not all(_is_readable(part) for part in rows):
            return None
        marked = [state.as_subclass(cls) for state in states]
        for one in marked:
            one.rows, one.span = rows, span
        return marked[0], marked[1]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Shapes and the like can be asked for, nothing can be computed."""
        if getattr(func, "__name__", "") == "__get__":
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise TypeError(
            "expected a model that attends to the packed cache, found one that computes with the "
            f"new token's keys alone ({getattr(func, '__name__', func)}); call "
            f"model.set_attn_implementation({PACKED_ATTENTION!r}), or make the cache without "
            "`attend_packed`"
        )


def _is_readable(rows: Rows) -> bool:
    if isinstance(rows.packed, PageStorage):
        return rows.packed.length > 0
    codec, device = rows.codec, rows.recent_BHTD.device.type
    packs = isinstance(codec, FittedCodec | Fp8Codec) or (
        isinstance(codec, MseCodec) and codec.bits < FP8 and codec.law == "gaussian"
    )
    wide = rows.recent_BHTD.shape[-1] >= LEAST_DIM
    return packs and wide and device == "cpu" and rows.packed_length >= LEAST_RECORDS


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function; [B, heads, 1, D] queries → [B, 1, heads, D]."""
    if more.get("s_aux") is not None or more.get("position_bias") is not None:
        raise ValueError("expected attention without biases or sink logits of its own, found some")
    if not isinstance(key, PackedStates):
        if softcap:
            return _capped(query, key, value, attention_mask, scaling, softcap), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **more
        )
    with torch.autocast(query.device.type, enabled=False):
        return _attend_packed(query, key, attention_mask, scaling, softcap), None


def _attend_packed(
    query: Tensor,
    key: PackedStates,
    attention_mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    batch, heads, _, dim = query.shape
    groups = key.rows[0].recent_BHTD.shape[1]
    attend = attend_pages if isinstance(key.rows[0].packed, PageStorage) else attend_rows
    out_BHGD = attend(
        query.view(batch, groups, heads // groups, dim),
        key.rows,
        _visible(key, attention_mask),
        scaling=dim**-0.5 if scaling is None else scaling,
        softcap=softcap or 0.0,
    )
    return out_BHGD.view(batch, 1, heads, dim).to(query.dtype)


def _capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """Attention with capped scores, which `sdpa` has not: [B, T, heads, D]."""
    group, dim = query.shape[1] // key.shape[1], query.shape[-1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    score = query @ key.mT * (dim**-0.5 if scaling is None else scaling)
    score = softcap * torch.tanh(score / softcap)
    if mask is None:
        tokens, seen = query.shape[2], key.shape[2]
        mask = torch.ones(tokens, seen, dtype=torch.bool, device=query.device).tril(seen - tokens)
    if mask.dtype == torch.bool:
        score = score.masked_fill(~mask, torch.finfo(score.dtype).min)
    else:
        score = score + mask
    out = score.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
    return out.transpose(1, 2).contiguous()


def _visible(key: PackedStates, mask: Tensor | None) -> list[tuple[int, int]]:
    """The slots that each sequence's token sees."""
    first, end = key.span
    batch = key.rows[0].batch_size
    if mask is None:
        return [(first, end)] * batch
    seen_BT = mask[:, 0, -1] if mask.dtype == torch.bool else mask[:, 0, -1] >= 0
    seen_BT = seen_BT.expand(batch, -1)
    starts = seen_BT.int().argmax(-1).tolist()
    counts = seen_BT.sum(-1).tolist()
    if any(start + count != end - first for start, count in zip(starts, counts, strict=True)):
        raise ValueError(
            "expected a mask that hides a sequence's first tokens alone, found another; use the "
            "cache without `attend_packed`"
        )
    return [(first + start, end) for start in starts]


AttentionInterface.register(PACKED_ATTENTION, _attend)
AttentionMaskInterface.register(PACKED_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
