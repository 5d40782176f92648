"""Attention of a generated token straight from the packed cache, on a CPU.

    model.set_attn_implementation(PACKED_ATTENTION)
    model.generate(**batch, past_key_values=TurboQuantCache(config, scheme, attend_packed=True))

Prompts, and caches that no packed kernel reads, are decoded for transformers' `sdpa` as ever. A
generated token's keys and values reach the attention as `PackedStates`, which any other attention
refuses. Tokens in 16 bits (sinks, recent ones) meet the packed ones in one softmax.

Shape suffixes: B sequences, H key/value heads, G query heads of each, T tokens, R tokens in 16
bits, D head size, C coded channels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from stillhouse.kernels.paged_attention import FP8, RecordFormat, VectorFormat
from stillhouse.kernels.paged_attention.refusals import LEAST_RECORDS
from stillhouse.kernels.turboquant import (
    ChannelGroup,
    FittedCodec,
    Fp8Codec,
    Fp8Vectors,
    MseCodec,
)
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
    codec, device = rows.codec, rows.recent_BHTD.device.type
    packs = isinstance(codec, FittedCodec | Fp8Codec) or (
        isinstance(codec, MseCodec) and codec.bits < FP8 and codec.law == "gaussian"
    )
    return packs and device == "cpu" and rows.packed_length >= LEAST_RECORDS


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
    query_BHGD = query.view(batch, groups, heads // groups, dim).float()
    query_BHGD = query_BHGD * (dim**-0.5 if scaling is None else scaling)
    out_BHGD = attend_rows(query_BHGD, key.rows, _visible(key, attention_mask), softcap or 0.0)
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


def attend_rows(
    query_BHGD: Tensor, rows: tuple[Rows, ...], visible: Sequence[tuple[int, int]], softcap: float
) -> Tensor:
    """softmax(q · keys) · values over the slots [first, end) of each sequence: [B, H, G, D].

    query_BHGD: float32, times the softmax scale.
    """
    from stillhouse.kernels.paged_attention import cpu

    keys, values = rows
    codec: Any = keys.codec
    shown: Any = values.codec
    decoder = cpu.decoder(
        RecordFormat.of(_format(codec), _format(shown)), query_BHGD.shape[2], softcap
    )
    mean_HD = _mean(codec)
    offset = None if mean_HD is None else (query_BHGD @ mean_HD[:, :, None])[..., 0]
    start = _pads_and_sinks(keys, len(visible))
    ranges = [
        (max(first, at, keys.first_packed) - keys.first_packed, keys.packed_length)
        for (first, _), at in zip(visible, start, strict=True)
    ]
    m_BHG, total_BHG, sum_BHGC = decoder.attend(
        query_BHGD if isinstance(codec, Fp8Codec) else codec.query_in_coded(query_BHGD),
        _packed(keys.packed),
        _packed(values.packed),
        ranges,
        offset_BHG=offset,
    )
    out_BHGD = sum_BHGC if isinstance(shown, Fp8Codec) else shown.from_coded(sum_BHGC)
    mean_HD = _mean(shown)
    if mean_HD is not None:
        out_BHGD = out_BHGD + total_BHG[..., None] * mean_HD[:, None]
    if keys.sinks is None and not keys.recent_BHTD.shape[2]:
        return out_BHGD / total_BHG[..., None]
    return _with_raw(query_BHGD, rows, visible, softcap, (m_BHG, total_BHG, out_BHGD))


def _with_raw(
    query_BHGD: Tensor,
    rows: tuple[Rows, ...],
    visible: Sequence[tuple[int, int]],
    softcap: float,
    packed: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """The softmax over packed tokens and those in 16 bits."""
    m_BHG, total_BHG, out_BHGD = packed
    key_BHRD, value_BHRD = (_raw(part) for part in rows)
    score_BHGR = query_BHGD @ key_BHRD.mT
    if softcap:
        score_BHGR = softcap * torch.tanh(score_BHGR / softcap)
    hidden_BR = _hidden(rows[0], visible)
    if hidden_BR is not None:
        score_BHGR = score_BHGR.masked_fill(hidden_BR[:, None, None], -torch.inf)
    top_BHG = torch.maximum(m_BHG, score_BHGR.amax(-1))
    weight_BHGR = (score_BHGR - top_BHG[..., None]).exp()
    share_BHG = (m_BHG - top_BHG).exp()
    total_BHG = total_BHG * share_BHG + weight_BHGR.sum(-1)
    out_BHGD = out_BHGD * share_BHG[..., None] + weight_BHGR @ value_BHRD
    return out_BHGD / total_BHG[..., None]


def _raw(rows: Rows) -> Tensor:
    """Sinks, then recent ones."""
    recent = rows.recent_BHTD.float()
    return recent if rows.sinks is None else torch.cat((rows.sinks.values_BHSD.float(), recent), 2)


def _pads_and_sinks(rows: Rows, batch: int) -> list[int]:
    """The first slot of each sequence that is neither a pad nor a sink."""
    sinks = rows.sinks
    if sinks is None:
        return [0] * batch
    padding = [0] * batch if sinks.padding_B is None else sinks.padding_B.tolist()
    return [pads + sinks.count for pads in padding]


def _hidden(rows: Rows, visible: Sequence[tuple[int, int]]) -> Tensor | None:
    """Which of the tokens of `_raw` no query sees, [B, R]; None where all are seen."""
    sinks = 0 if rows.sinks is None else rows.sinks.count
    recent = rows.recent_BHTD.shape[2]
    starts = _pads_and_sinks(rows, len(visible))
    end = visible[0][1]
    plain = all(first == 0 for first, _ in visible) and all(at <= end - recent for at in starts)
    if plain and (rows.sinks is None or rows.sinks.padding_B is None):
        return None
    first_B1 = torch.tensor([[first] for first, _ in visible])
    start_B1 = torch.tensor([[at] for at in starts])
    sink_BS = start_B1 - sinks + torch.arange(sinks)
    recent_BR = torch.arange(end - recent, end).expand(len(visible), -1)
    seen_BS = (sink_BS >= first_B1) & (sink_BS < end)
    seen_BR = (recent_BR >= first_B1) & (recent_BR >= start_B1)
    return ~torch.cat((seen_BS, seen_BR), dim=-1)


def _format(codec: Any) -> VectorFormat:
    if isinstance(codec, Fp8Codec):
        return VectorFormat((ChannelGroup(codec.head_dim, FP8),))
    return VectorFormat(codec.coded_groups)


def _mean(codec: Any) -> Tensor | None:
    return codec.fit.mean_HD if isinstance(codec, FittedCodec) else None


def _packed(record: Any) -> Any:
    from stillhouse.kernels.paged_attention.cpu import PackedHalf

    if isinstance(record, Fp8Vectors):
        return PackedHalf(record.codes)
    return PackedHalf(record.indices, record.scalars)


AttentionInterface.register(PACKED_ATTENTION, _attend)
AttentionMaskInterface.register(PACKED_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
