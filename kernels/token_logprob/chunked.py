"""log softmax(hidden @ weight^T + bias)[target], a chunk of tokens at a time, with its gradients.

As in Liger Kernel's fused linear cross entropy (arXiv:2410.10989, §3.2), the gradient with respect
to `hidden` is computed in the forward pass, while a chunk's logits are there. Unlike a mean loss,
each token has its own upstream gradient g_t, unknown until the backward pass. It is one factor a
row for `hidden`, so the rows are kept for g = 1 and scaled. For `weight` and `bias` it is inside
the sum over tokens, so the logits are computed again, chunk by chunk, and the gradient is exact.

Shape suffixes: T tokens, C tokens of a chunk, D hidden size, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import linear

DEFAULT_CHUNK = 128  # 128 MiB of logits at a vocabulary of 262,144
_VOCABULARY_BLOCK = 8192  # rows of a low-precision weight widened at a time


class _Head(NamedTuple):
    weight_VD: Tensor
    bias_V: Tensor | None
    softcap: float | None


def token_logprob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    chunk: int = DEFAULT_CHUNK,
) -> Tensor:
    """The log-probability of each target token: float32 [T] (float64 for float64 inputs).

    hidden_TD: [T, D], weight_VD: [V, D] and bias_V: [V], floating; inputs below float32 are
    widened, so sums are in float32. target_T: int64 [T] in 0…V-1. softcap: bounds logits, bias
    included, by softcap·tanh(·/softcap). chunk: tokens at a time; one [chunk, V] buffer is alive,
    two with softcap and gradients.

    Differentiable once in hidden, weight and bias; nothing is computed for gradients under no_grad.
    ValueError for shapes or dtypes that do not fit and for targets outside the vocabulary (this
    reads one number back from the device): drop tokens without a loss before the call.
    """
    head = _Head(weight_VD, bias_V, softcap)
    _require_inputs(hidden_TD, head, target_T, chunk)
    inputs = (hidden_TD, weight_VD) if bias_V is None else (hidden_TD, weight_VD, bias_V)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return _apply(hidden_TD, weight_VD, bias_V, target_T, softcap, chunk)
    with torch.no_grad():
        return _forward(hidden_TD, head, target_T, chunk, None)


class _Context(FunctionCtx):
    """What the forward pass leaves for the backward pass."""

    saved_tensors: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]
    needs_input_grad: tuple[bool, ...]
    softcap: float | None
    chunk: int

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """As torch's, whose annotation leaves out None."""


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_T: Tensor,
        softcap: float | None,
        chunk: int,
    ) -> Tensor:
        # Rows of d logprob_t / d hidden_t, in the wide dtype: they are scaled before rounding.
        rows = hidden_TD.shape[0] if ctx.needs_input_grad[0] else 0
        grad_TD = hidden_TD.new_empty(
            (rows, hidden_TD.shape[1]), dtype=_wide_dtype(hidden_TD, weight_VD)
        )
        head = _Head(weight_VD, bias_V, softcap)
        logprob_T = _forward(hidden_TD, head, target_T, chunk, grad_TD if rows else None)
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, target_T, grad_TD)
        ctx.softcap, ctx.chunk = softcap, chunk
        return logprob_T

    @staticmethod
    @once_differentiable
    def backward(
        ctx: _Context, upstream_T: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        hidden_TD, weight_VD, bias_V, target_T, grad_TD = ctx.saved_tensors
        head = _Head(weight_VD, bias_V, ctx.softcap)
        hidden_grad = weight_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            # Not in place: the graph may be walked again under retain_graph.
            hidden_grad = (grad_TD * upstream_T[:, None]).to(hidden_TD.dtype)
        if any(ctx.needs_input_grad[1:3]):
            weight_grad, bias_grad = _head_gradients(
                hidden_TD, head, target_T, upstream_T, ctx.chunk, ctx.needs_input_grad[1:3]
            )
        return hidden_grad, weight_grad, bias_grad, None, None, None


def _forward(
    hidden_TD: Tensor, head: _Head, target_T: Tensor, chunk: int, grad_TD: Tensor | None
) -> Tensor:
    """Log-probabilities [T]; writes d logprob_t / d hidden_t into `grad_TD` when it is given."""
    wide = _wide_dtype(hidden_TD, head.weight_VD)
    logprob_T = hidden_TD.new_empty(hidden_TD.shape[0], dtype=wide)
    for rows in _chunks(hidden_TD.shape[0], chunk):
        logits_CV = _logits(hidden_TD[rows], head)
        slope_CV = None if grad_TD is None else _softcap_slope(logits_CV, head.softcap)
        logprob_T[rows] = _softmax_(logits_CV, target_T[rows])
        if grad_TD is not None:
            _logit_gradient_(logits_CV, target_T[rows], slope_CV)
            _multiply_weight(logits_CV, head.weight_VD, grad_TD[rows])
    return logprob_T


# torch types `apply` as untyped; its arguments are those of `forward`.
_apply = cast(
    Callable[[Tensor, Tensor, Tensor | None, Tensor, float | None, int], Tensor],
    _TokenLogprob.apply,
)


def _head_gradients(
    hidden_TD: Tensor,
    head: _Head,
    target_T: Tensor,
    upstream_T: Tensor,
    chunk: int,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """Those of weight and bias that are wanted, in their dtypes.

    Σ_t g_t · (d logprob_t / d logits_t) ⊗ hidden_t, [V, D], and the same sum without hidden, [V].
    """
    wide = _wide_dtype(hidden_TD, head.weight_VD)
    grad_VD = torch.zeros_like(head.weight_VD, dtype=wide) if wanted[0] else None
    grad_V = head.weight_VD.new_zeros(head.weight_VD.shape[0], dtype=wide)
    for rows in _chunks(hidden_TD.shape[0], chunk):
        logits_CV = _logits(hidden_TD[rows], head)
        slope_CV = _softcap_slope(logits_CV, head.softcap)
        _softmax_(logits_CV, target_T[rows])
        _logit_gradient_(logits_CV, target_T[rows], slope_CV)
        logits_CV *= upstream_T[rows, None]
        grad_V += logits_CV.sum(0)
        if grad_VD is not None:
            grad_VD.addmm_(logits_CV.T, hidden_TD[rows].to(wide))
    return (
        None if grad_VD is None else grad_VD.to(head.weight_VD.dtype),
        None if head.bias_V is None or not wanted[1] else grad_V.to(head.bias_V.dtype),
    )


def _logits(hidden_CD: Tensor, head: _Head) -> Tensor:
    """A fresh [C, V] buffer of (capped) logits in the wide dtype."""
    weight_VD, bias_V, softcap = head
    wide = _wide_dtype(hidden_CD, weight_VD)
    hidden_CD = hidden_CD.to(wide)
    logits_CV = _product(hidden_CD, weight_VD)
    if bias_V is not None:
        logits_CV += bias_V.to(wide)
    if softcap is not None:
        logits_CV.div_(softcap).tanh_().mul_(softcap)
    return logits_CV


def _product(hidden_CD: Tensor, weight_VD: Tensor) -> Tensor:
    """hidden @ weight^T in hidden's dtype, a fresh [C, V]."""
    wide = hidden_CD.dtype
    if _is_plain_product(hidden_CD, weight_VD):
        return linear(hidden_CD, weight_VD)
    logits_CV = hidden_CD.new_empty((hidden_CD.shape[0], weight_VD.shape[0]))
    # Products with `out`, and those in place elsewhere, are none that autocast would round.
    for block in _weight_blocks(weight_VD, wide):
        torch.mm(hidden_CD, weight_VD[block].to(wide).T, out=logits_CV[:, block])
    return logits_CV


def _is_plain_product(left: Tensor, weight_VD: Tensor) -> bool:
    """Whether F.linear may multiply these: by that name, modes that multiply faster know it."""
    return weight_VD.dtype == left.dtype and not torch.is_autocast_enabled(left.device.type)


def _multiply_weight(grad_CV: Tensor, weight_VD: Tensor, out_CD: Tensor) -> None:
    """out = grad @ weight, in the wide dtype."""
    if _is_plain_product(grad_CV, weight_VD):
        out_CD.copy_(linear(grad_CV, weight_VD.T))
        return
    out_CD.zero_()
    for block in _weight_blocks(weight_VD, out_CD.dtype):
        out_CD.addmm_(grad_CV[:, block], weight_VD[block].to(out_CD.dtype))


def _softcap_slope(logits_CV: Tensor, softcap: float | None) -> Tensor | None:
    """d capped / d raw = 1 - tanh², from the capped logits."""
    return None if softcap is None else (logits_CV / softcap).square_().neg_().add_(1)


def _softmax_(logits_CV: Tensor, target_C: Tensor) -> Tensor:
    """Overwrite logits with probabilities; return the targets' log-probabilities [C]."""
    logits_CV -= logits_CV.amax(dim=-1, keepdim=True)
    shifted_C = logits_CV.gather(1, target_C[:, None]).squeeze(1)
    mass_C = logits_CV.exp_().sum(dim=-1)
    logits_CV /= mass_C[:, None]
    return shifted_C - mass_C.log()


def _logit_gradient_(probability_CV: Tensor, target_C: Tensor, slope_CV: Tensor | None) -> None:
    """Overwrite probabilities with d logprob / d raw logits = (onehot - p) · slope."""
    probability_CV.neg_()
    one = probability_CV.new_ones((target_C.shape[0], 1))
    probability_CV.scatter_add_(1, target_C[:, None], one)
    if slope_CV is not None:
        probability_CV *= slope_CV


def _wide_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    wide = torch.promote_types(hidden.dtype, weight.dtype)
    return wide if wide == torch.float64 else torch.float32


def _chunks(length: int, chunk: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk, length)) for start in range(0, length, chunk))


def _weight_blocks(weight_VD: Tensor, wide: torch.dtype) -> Iterator[slice]:
    """All rows at once when nothing is widened, else blocks, so that no wide copy is held."""
    rows = weight_VD.shape[0]
    return _chunks(rows, rows if weight_VD.dtype == wide else _VOCABULARY_BLOCK)


def _require_inputs(hidden_TD: Tensor, head: _Head, target_T: Tensor, chunk: int) -> None:
    weight_VD, bias_V, softcap = head
    shapes = [list(t.shape) for t in (hidden_TD, weight_VD, target_T)]
    fits = [len(shape) for shape in shapes] == [2, 2, 1]
    if not fits or shapes[0][1] != shapes[1][1] or shapes[0][0] != shapes[2][0]:
        raise ValueError(f"expected hidden [T, D], weight [V, D], target [T], found {shapes}")
    if not (hidden_TD.is_floating_point() and weight_VD.is_floating_point()):
        raise ValueError(
            f"expected floating hidden and weight, found {hidden_TD.dtype}, {weight_VD.dtype}"
        )
    if bias_V is not None and (
        bias_V.shape != weight_VD.shape[:1] or not bias_V.is_floating_point()
    ):
        raise ValueError(
            f"expected a floating bias [{weight_VD.shape[0]}] or None, found {bias_V.dtype} "
            f"{list(bias_V.shape)}"
        )
    if target_T.dtype != torch.int64:
        raise ValueError(f"expected int64 targets, found {target_T.dtype}")
    if chunk < 1:
        raise ValueError(f"expected a chunk of at least one token, found {chunk}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(
            f"expected a positive, finite softcap, or None for no cap, found {softcap}"
        )
    vocabulary = weight_VD.shape[0]
    outside = (target_T < 0) | (target_T >= vocabulary)
    if bool(outside.any()):
        found = target_T[outside][0].item()
        raise ValueError(
            f"expected targets in 0…{vocabulary - 1}, found {found}; "
            "drop tokens without a loss (such as -100) before the call"
        )
