"""The plain form in float64: all logits, then log_softmax, with autograd's own gradients.

Shape suffixes: T tokens, D hidden size, V vocabulary.
"""

import torch
from torch import Tensor


def token_logprob_reference(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """float64 [T]: log softmax(hidden @ weight^T + bias)[target], bounded by softcap·tanh(·)."""
    logits_TV = hidden_TD.double() @ weight_VD.double().T
    if bias_V is not None:
        logits_TV = logits_TV + bias_V.double()
    if softcap is not None:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    logprob_TV = torch.log_softmax(logits_TV, dim=-1)
    return logprob_TV.gather(1, target_T[:, None]).squeeze(1)
