"""What a calibration needs to know of keys and values, streamed over a corpus in float64.

For each layer and KV head: mean and second moment of the post-RoPE keys and of the values as
attention reads them, and of the gradients of log p(y) with respect to them, y drawn from the
model's own next-token distribution. The last is the Fisher information: errors δ_t, independent
from token to token, of a layer's keys raise the mean next-token KL by ½ E[δ^T F δ] to second order
(Martens, arXiv:1412.1193, §5), whatever lies between the key and the logits. Costs of all layers,
keys and values are thus in one unit, nats a token.

Shape suffixes: B sequences (one), H key/value heads, T tokens, C positions of a chunk, D head size,
M hidden size, V vocabulary.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from stillhouse.errors import ModelError
from stillhouse.workers.batching import pad_right
from stillhouse.workers.models.language_model import LanguageModel, decoder_and_head
from stillhouse.workers.projection import core, hidden_states

_CHUNK = 64  # positions projected to the vocabulary at a time

Change = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


def _unchanged(_layer: int, key_BHTD: Tensor, value_BHTD: Tensor) -> tuple[Tensor, Tensor]:
    return key_BHTD, value_BHTD


@dataclass(frozen=True, slots=True)
class _Watch:
    change: Change
    seen: dict[int, tuple[Tensor, Tensor]]


_watch: ContextVar[_Watch] = ContextVar("the watch over the attention that runs")


@dataclass(slots=True)
class VectorMoments:
    """Sums over tokens of one layer's keys or values, float64 on the CPU."""

    tokens: int
    sum_HD: Tensor
    outer_HDD: Tensor
    gradient_HDD: Tensor

    @classmethod
    def zeros(cls, heads: int, dim: int) -> "VectorMoments":
        """Of no token."""
        square = torch.zeros((heads, dim, dim), dtype=torch.float64, device="cpu")
        return cls(0, square[:, 0].clone(), square, square.clone())

    def add(self, x_HTD: Tensor, gradient_HTD: Tensor) -> None:
        """Some tokens more, of any float dtype and device."""
        x_HTD, gradient_HTD = x_HTD.double(), gradient_HTD.double()
        self.tokens += x_HTD.shape[1]
        self.sum_HD += x_HTD.sum(1).cpu()
        self.outer_HDD += (x_HTD.mT @ x_HTD).cpu()
        self.gradient_HDD += (gradient_HTD.mT @ gradient_HTD).cpu()

    def mean(self) -> Tensor:
        """Mean vector of each head."""
        return self.sum_HD / self.tokens

    def covariance(self) -> Tensor:
        """Covariance of each head."""
        mean_HD = self.mean()
        return self.outer_HDD / self.tokens - mean_HD[:, :, None] * mean_HD[:, None]

    def fisher(self) -> Tensor:
        """F: an error δ of every token costs ½ E[δ^T F δ] nats a token."""
        return self.gradient_HDD / self.tokens


@dataclass(frozen=True, slots=True)
class LayerMoments:
    """Of one layer."""

    key: VectorMoments
    value: VectorMoments


def stream_moments(
    lm: LanguageModel,
    rows: Iterable[Sequence[int]],
    skip: int,
    seed: int = 0,
) -> list[LayerMoments]:
    """Moments of all layers over token rows, each a sequence of its own.

    skip: first tokens of each row that are not counted, as they stay in 16 bits. seed: of the draws
    of y. Memory is that of one row's backward pass and of the sums; nothing of a row is kept.

    ModelError when the model's attention cannot be watched, or gives a token no number.
    """
    model = core(lm)
    generator = torch.Generator(device=model.device).manual_seed(seed)
    layers: dict[int, LayerMoments] = {}
    for row in rows:
        if len(row) <= skip:
            continue
        for index, pair in _observe(lm, row, generator).items():
            if index not in layers:
                zeros = (VectorMoments.zeros(x.shape[0], x.shape[2]) for x, _ in pair)
                layers[index] = LayerMoments(*zeros)
            moments = layers[index]
            for sums, (x_HTD, gradient_HTD) in zip((moments.key, moments.value), pair, strict=True):
                sums.add(x_HTD[:, skip:], gradient_HTD[:, skip:])
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    if sorted(layers) != list(range(count)):
        raise ModelError(
            f"expected keys and values of {count} layers to calibrate with, found those of layers "
            f"{sorted(layers)}; no text was longer than {skip} tokens, or the attention of "
            f"{type(model).__name__} cannot be watched: use `compress.calibrate: false`"
        )
    return [layers[index] for index in range(count)]


_Pairs = dict[int, list[tuple[Tensor, Tensor]]]


def _observe(lm: LanguageModel, row: Sequence[int], generator: torch.Generator) -> _Pairs:
    """By layer: keys and their gradients, values and theirs, each [H, T, D]."""
    model = core(lm)
    batch = pad_right([row], lm.pad, model.device)
    with torch.enable_grad(), watched_attention(model) as seen:
        hidden_TM = hidden_states(lm, batch)[0]
        if not bool(torch.isfinite(hidden_TM).all()):
            raise ModelError("calibration: expected finite hidden states, found NaN or infinities")
        tensors = [tensor for pair in seen.values() for tensor in pair]
        score_TM = _sampled_score(lm, hidden_TM.detach(), generator)
        gradients = torch.autograd.grad(hidden_TM, tensors, score_TM)
    found = iter(zip(tensors, gradients, strict=True))
    pairs = {index: [next(found), next(found)] for index in seen}
    return {
        index: [(x_BHTD.detach()[0], gradient_BHTD[0]) for x_BHTD, gradient_BHTD in pair]
        for index, pair in pairs.items()
    }


@torch.no_grad()
def _sampled_score(lm: LanguageModel, hidden_TM: Tensor, generator: torch.Generator) -> Tensor:
    """∂ log p(y | hidden) / ∂ hidden with y ~ p drawn for each position, [T, M]."""
    _, head = decoder_and_head(core(lm))
    scores = []
    for hidden_CM in hidden_TM.split(_CHUNK):
        logit_CV = head.logits(hidden_CM, torch.float32)
        slope: Tensor | float = 1.0
        if head.softcap is not None:
            slope = 1 - (logit_CV / head.softcap).square()
        p_CV = logit_CV.softmax(-1)
        drawn_C1 = torch.multinomial(p_CV, 1, generator=generator)
        error_CV = p_CV.neg_().scatter_add_(
            1, drawn_C1, torch.ones_like(drawn_C1, dtype=p_CV.dtype)
        )
        scores.append((error_CV * slope).to(head.weight_VD.dtype) @ head.weight_VD)
    return torch.cat(scores)


@contextmanager
def watched_attention(
    model: PreTrainedModel, change: Change = _unchanged
) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Within it each forward pass fills the dictionary: layer index → keys and values [B, H, T, D].

    The tensors are those attention reads, part of the graph. change: what attention reads instead.
    """
    original = model.config._attn_implementation or "eager"
    name = f"stillhouse_watched_{original}"
    AttentionInterface.register(name, _watching(original))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    watch = _Watch(change, {})
    token = _watch.set(watch)
    model.set_attn_implementation(name)
    try:
        yield watch.seen
    finally:
        model.set_attn_implementation(original)
        _watch.reset(token)


def _watching(original: str) -> Callable[..., Any]:
    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any
    ) -> Any:
        watch = _watch.get()
        if torch.is_grad_enabled() and not key.requires_grad:
            # The first layer's: nothing below it has a gradient, all above it then do.
            key, value = key.requires_grad_(), value.requires_grad_()
        key, value = watch.change(module.layer_idx, key, value)
        watch.seen[module.layer_idx] = (key, value)
        eager = sys.modules[type(module).__module__].eager_attention_forward
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(original, eager)
        return attention(module, query, key, value, *rest, **more)

    return attend
