"""The map of a cache's values, moved into the weights that make and read them.

Attention returns Σ p_t v_t, linear in the values: with W_v' = T W_v and W_o' = W_o T^-1 the model
says what it said, and its values come already mapped. The cache then needs no map for them: no
table, no product a token.

Shape suffixes: H key/value heads, G query heads of each, D head size, M hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.kernels.turboquant import HeadFit
from stillhouse.workers.cache import CachePlan, LayerPlan

_FACT = "values_folded"
_PROBE = 16  # tokens
# Root mean square error of hidden states, of theirs; weights in 16 bits are rounded once more.
_CLOSE, _CLOSE_16 = 1e-4, 0.03


@torch.no_grad()
def fold_values(model: Any, plan: CachePlan) -> CachePlan:
    """Change the model's weights in place and return the plan that goes with them.

    Where the weights are not to be found, or the model says another thing with the folded ones (its
    attention does more to values than to sum them), the model and the plan stay as they were.
    `facts["values_folded"]` says how many layers are folded.
    """
    pairs = [_projections(model, index, layer.value) for index, layer in enumerate(plan.layers)]
    parameters = [parameter for pair in pairs if pair for parameter in pair.parameters]
    kept = [parameter.clone() for parameter in parameters]
    before = _say(model)
    layers: list[LayerPlan] = []
    for layer, pair in zip(plan.layers, pairs, strict=True):
        if pair is None or layer.value is None:
            layers.append(layer)
            continue
        _fold(pair, layer.value)
        layers.append(replace(layer, value=layer.value.without_map()))
    error = (_say(model) - before).square().mean().sqrt() / before.square().mean().sqrt()
    if bool(error < (_CLOSE if model.dtype == torch.float32 else _CLOSE_16)):  # False for NaN
        folded = sum(pair is not None for pair in pairs)
        return replace(plan, layers=tuple(layers), facts=dict(plan.facts) | {_FACT: folded})
    for parameter, was in zip(parameters, kept, strict=True):
        parameter.copy_(was)
    return replace(plan, facts=dict(plan.facts) | {_FACT: 0})


@dataclass(frozen=True, slots=True)
class _Pair:
    """What makes a layer's values, the last rows of `value`, and what reads them."""

    value: nn.Linear
    out: nn.Linear

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that folding changes, and what else these have."""
        return [*self.value.parameters(), *self.out.parameters()]


def _projections(model: Any, index: int, fit: HeadFit | None) -> _Pair | None:
    """A layer's projections of values and of attention's output, where it has them and they fit."""
    if fit is None or fit.map_HDD is None:
        return None
    layers: Sequence[Any] = getattr(model.get_decoder(), "layers", ())
    attention = getattr(layers[index], "self_attn", None) if index < len(layers) else None
    value = _linear(attention, "v_proj", "qkv_proj")
    out = _linear(attention, "o_proj", "dense")
    if value is None or out is None:
        return None
    width = fit.mean_HD.numel()
    fused = out.in_features + 2 * width  # queries, keys, values
    if value.out_features not in (width, fused) or out.in_features % width:
        return None
    return _Pair(value, out)


def _linear(attention: Any, *names: str) -> nn.Linear | None:
    found = (getattr(attention, name, None) for name in names)
    return next((part for part in found if isinstance(part, nn.Linear)), None)


def _fold(pair: _Pair, fit: HeadFit) -> None:
    assert fit.map_HDD is not None
    map_HDD = fit.map_HDD.to(pair.value.weight.device, torch.float64)
    heads, dim, _ = map_HDD.shape
    weight = pair.value.weight[-heads * dim :]
    weight_HDM = weight.double().view(heads, dim, -1)
    weight.copy_((map_HDD @ weight_HDM).flatten(0, 1))
    if pair.value.bias is not None:
        bias = pair.value.bias[-heads * dim :]
        bias.copy_((map_HDD @ bias.double().view(heads, dim, 1)).flatten())
    # query heads of a key/value head stand side by side
    out = pair.out
    weight_HMGD = out.weight.double().view(out.out_features, heads, -1, dim).transpose(0, 1)
    folded_HMGD = weight_HMGD @ torch.linalg.inv(map_HDD)[:, None]
    out.weight.copy_(folded_HMGD.transpose(0, 1).flatten(1))


def _say(model: Any) -> Tensor:
    """Hidden states for some tokens, [T, M]."""
    words = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(1, 1 + _PROBE, device=model.device)[None] * 7919 % words
    states: Tensor = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    return states[0].double()
