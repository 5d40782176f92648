"""The map of a cache's values, moved into the weights that make and read them.

Attention returns Σ p_t v_t, linear in the values: with W_v' = T W_v and W_o' = W_o T^-1 the model
says what it said, and its values come already mapped. The cache then needs no map for them: no
table, no product a token.

Shape suffixes: H key/value heads, G query heads of each, D head size, M hidden size.
"""

from collections.abc import Sequence
from dataclasses import replace
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
    parameters = [parameter for pair in pairs if pair for parameter in _parameters(pair)]
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


_Pair = tuple[nn.Linear, nn.Linear]


def _projections(model: Any, index: int, fit: HeadFit | None) -> _Pair | None:
    """A layer's v_proj and o_proj, where it has them and they fit."""
    if fit is None or fit.map_HDD is None:
        return None
    heads, dim = fit.mean_HD.shape
    layers: Sequence[Any] = getattr(model.get_decoder(), "layers", ())
    attention = getattr(layers[index], "self_attn", None) if index < len(layers) else None
    value, out = getattr(attention, "v_proj", None), getattr(attention, "o_proj", None)
    if not isinstance(value, nn.Linear) or not isinstance(out, nn.Linear):
        return None
    if value.out_features != heads * dim or out.in_features % (heads * dim):
        return None
    return value, out


def _parameters(pair: _Pair) -> list[nn.Parameter]:
    return [parameter for projection in pair for parameter in projection.parameters()]


def _fold(pair: _Pair, fit: HeadFit) -> None:
    value, out = pair
    assert fit.map_HDD is not None
    map_HDD = fit.map_HDD.to(value.weight.device, torch.float64)
    heads, dim, _ = map_HDD.shape
    weight_HDM = value.weight.double().view(heads, dim, -1)
    value.weight.copy_((map_HDD @ weight_HDM).flatten(0, 1))
    if value.bias is not None:
        bias_HD1 = value.bias.double().view(heads, dim, 1)
        value.bias.copy_((map_HDD @ bias_HD1).flatten())
    # query heads of a key/value head stand side by side
    weight_HMGD = out.weight.double().view(out.out_features, heads, -1, dim).transpose(0, 1)
    folded_HMGD = weight_HMGD @ torch.linalg.inv(map_HDD)[:, None]
    out.weight.copy_(folded_HMGD.transpose(0, 1).flatten(1))


def _say(model: Any) -> Tensor:
    """Hidden states for some tokens, [T, M]."""
    words = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(1, 1 + _PROBE, device=model.device)[None] * 7919 % words
    states: Tensor = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    return states[0].double()
