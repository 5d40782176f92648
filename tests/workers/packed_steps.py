"""Schemes, and steps of small models, for tests of attention over packed vectors."""

import copy
from typing import Any

import torch

from stillhouse.kernels.turboquant import ChannelGroup, Fp8Codec, balance, fit_heads
from stillhouse.workers.cache import (
    PACKED_ATTENTION,
    CacheFormat,
    CachePlan,
    FittedScheme,
    LayerPlan,
    ObliviousScheme,
    SameCodecScheme,
)
from tests.workers.cache_models import HEAD_DIM, HEADS, tokens


def fitted(layers: int, sinks: int, recent: int, head_dim: int = HEAD_DIM) -> FittedScheme:
    """A coded channel group, one of no bits, and means; values without a map."""
    spread = torch.logspace(0, -1, head_dim, dtype=torch.float64)
    matrix = torch.diag(spread).expand(HEADS, head_dim, head_dim)
    coded = min(64, head_dim - 8)
    fit = fit_heads(
        torch.randn(HEADS, head_dim, generator=torch.Generator().manual_seed(0)),
        balance(matrix, matrix),
        (ChannelGroup(coded, 4), ChannelGroup(head_dim - coded, 0)),
    )
    return FittedScheme(CachePlan((LayerPlan(fit, fit.without_map()),) * layers, sinks, recent))


def scheme(
    name: str, layers: int, sinks: int, recent: int, head_dim: int = HEAD_DIM
) -> FittedScheme | SameCodecScheme:
    """`fitted`, `fp8`, or `mse` and `planes`: 4 bits for keys and 3 for values, or the reverse."""
    if name == "fitted":
        return fitted(layers, sinks, recent, head_dim)
    if name == "fp8":
        return SameCodecScheme(lambda dim, _kind, _device: Fp8Codec(dim), sinks, recent)
    bits = (3, 4) if name == "planes" else (4, 3)
    return ObliviousScheme(CacheFormat(*bits, sinks=sinks, recent=recent))


@torch.no_grad()
def generated(
    model: Any, ids: torch.Tensor, cache: Any, mask: torch.Tensor | None, count: int = 12
) -> torch.Tensor:
    """Logits of `count` tokens after the prompt, always the same ones."""
    steps = tokens(ids.shape[0], count, seed=5).to(ids.device)
    found = [model(ids, past_key_values=cache, attention_mask=mask).logits[:, -1]]
    for step in range(count):
        if mask is not None:
            mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
        out = model(steps[:, step : step + 1], past_key_values=cache, attention_mask=mask)
        found.append(out.logits[:, -1])
    return torch.stack(found)


def packed_model(model: Any) -> Any:
    """A copy that reads packed vectors."""
    found = copy.deepcopy(model)
    found.set_attn_implementation(PACKED_ATTENTION)
    return found


def left_padded(ids: torch.Tensor, pads: list[int]) -> torch.Tensor:
    """The mask of a batch with so many pads before each sequence."""
    return (torch.arange(ids.shape[1]) >= torch.tensor(pads)[:, None]).to(ids)
