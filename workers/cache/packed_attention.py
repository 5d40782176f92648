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
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from stillhouse.kernels.paged_attention import FP8, RecordFormat, VectorFormat
from stillhouse.kernels.paged_attention.refusals import LEAST_DIM, LEAST_RECORDS
from stillhouse.kernels.turboquant import (
    ChannelGroup,
    FittedCodec,
    Fp8Codec,
    Fp8Vectors,
    MseCodec,
)
from stillhouse.workers.cache.rows import Rows

PACKED_ATTENTION = "stillhouse_packed"
_DECODERS: WeakKeyDictionary[Any, tuple[Any, Any]] = WeakKeyDictionary()


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
    query_BHGD = query.view(batch, groups, heads // groups, dim).float()
    out_BHGD = attend_rows(
        query_BHGD,
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


def attend_rows(
    query_BHGD: Tensor,
    rows: tuple[Rows, ...],
    visible: Sequence[tuple[int, int]],
    *,
    scaling: float,
    softcap: float = 0.0,
) -> Tensor:
    """softmax(q · keys · scaling) · values over the slots [first, end) of each sequence.

    query_BHGD: float32. Returns float32 [B, H, G, D].
    """
    from stillhouse.kernels.paged_attention import cpu

    keys, values = rows
    codec: Any = keys.codec
    shown: Any = values.codec
    decoder = _decoder(codec, shown, query_BHGD.shape[2], softcap)
    query_BHGD = query_BHGD * (scaling * cpu.LOG2E)
    mean_HD = _mean(codec)
    ranges, raw_ranges = _ranges(keys, visible)
    coded_BHGC, raw_BHGD = decoder.attend_with(
        query_BHGD if isinstance(codec, Fp8Codec) else codec.query_in_coded(query_BHGD),
        _packed(keys.packed),
        _packed(values.packed),
        ranges,
        cpu.RawTokens(query_BHGD, _raw_parts(rows), raw_ranges, _mean(shown)),
        offset_BHG=None if mean_HD is None else (query_BHGD @ mean_HD[:, :, None])[..., 0],
    )
    packed_BHGD = coded_BHGC if isinstance(shown, Fp8Codec) else shown.from_coded(coded_BHGC)
    out_BHGD: Tensor = raw_BHGD.add_(packed_BHGD)
    return out_BHGD


def _decoder(codec: Any, shown: Any, group: int, softcap: float) -> Any:
    """Kept with the keys' codec: a format's hash takes as long as a small head's attention."""
    from stillhouse.kernels.paged_attention import cpu

    found = _DECODERS.get(codec)
    if found is None or found[0] != (id(shown), group, softcap):
        format = RecordFormat.of(_format(codec), _format(shown))
        found = (id(shown), group, softcap), cpu.decoder(format, group, softcap)
        _DECODERS[codec] = found
    return found[1]


def _raw_parts(rows: tuple[Rows, ...]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Keys and values of the sinks, and of recent tokens."""
    keys, values = rows
    recent = keys.recent_BHTD, values.recent_BHTD
    if keys.sinks is None or values.sinks is None:
        return (recent[0][:, :, :0], recent[1][:, :, :0]), recent
    return (keys.sinks.values_BHSD, values.sinks.values_BHSD), recent


def _ranges(
    rows: Rows, visible: Sequence[tuple[int, int]]
) -> tuple[list[tuple[int, int]], list[tuple[int, int, int, int]]]:
    """Of each sequence the packed vectors, and the sinks and recent tokens, that its token sees."""
    sinks = 0 if rows.sinks is None else rows.sinks.count
    recent = rows.recent_BHTD.shape[2]
    packed, raw = [], []
    for (first, end), start in zip(visible, _pads_and_sinks(rows, len(visible)), strict=True):
        begin = max(first, start, rows.first_packed) - rows.first_packed
        packed.append((begin, rows.packed_length))
        zero = start - sinks  # the slot of the first sink
        seen = max(first - zero, 0), min(end - zero, sinks)
        raw.append((*seen, min(max(max(first, start) - (end - recent), 0), recent), recent))
    return packed, raw


def _pads_and_sinks(rows: Rows, batch: int) -> list[int]:
    """The first slot of each sequence that is neither a pad nor a sink."""
    sinks = rows.sinks
    if sinks is None:
        return [0] * batch
    padding = [0] * batch if sinks.padding_B is None else sinks.padding_B.tolist()
    return [pads + sinks.count for pads in padding]


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
