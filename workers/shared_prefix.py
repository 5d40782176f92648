"""Tokens that all rows of a batch begin with, such as a template's head: computed once.

Shape letters: B rows of a batch, P tokens of the prefix, T positions after it, H heads of keys and
values, D their size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from stillhouse.workers.cache.turboquant import layer_windows
from stillhouse.workers.models.language_model import LanguageModel
from stillhouse.workers.projection import TargetRow, continued_states, core

LEAST_TOKENS = 16  # of a prefix
LEAST_SAVED = 128  # tokens of a batch that need not be computed; one more call costs about 30
_REUSED = 0.75  # the share of a prefix that an earlier one must cover to be used in its place


class PrefixSource:
    """Keys and values of what rows share, under one model in one state of its adapter.

    The last prefix is kept for the batches that come next, whole or cut: under a causal mask no
    token knows how many follow it.
    """

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm
        self._possible = _keeps_plain_keys(lm)
        self._ids: Sequence[int] = ()
        self._states: list[tuple[Tensor, Tensor]] = []

    def shared(self, rows: Sequence[TargetRow]) -> tuple[int, Cache | None]:
        """How many first tokens to leave out of each row, and the cache that stands for them."""
        length = shared_length(rows) if self._possible else 0
        if length < LEAST_TOKENS or length * (len(rows) - 1) < LEAST_SAVED:
            return 0, None
        prefix = rows[0].ids[:length]
        covered = _common_length(self._ids, prefix)
        if covered < _REUSED * length:
            self._compute(prefix)
            covered = length
        layers = [_PrefixLayer(k[:, :, :covered], v[:, :, :covered]) for k, v in self._states]
        return covered, Cache(layers=list(layers))

    def _compute(self, ids: Sequence[int]) -> None:
        cache = DynamicCache()  # without the configuration its layers keep every token
        continued_states(self._lm, torch.tensor([list(ids)], device=core(self._lm).device), cache)
        self._ids, self._states = ids, [_states(layer) for layer in cache.layers]


def shared_length(rows: Sequence[TargetRow]) -> int:
    """Tokens that all rows begin with, before any that predicts a target."""
    ordered = sorted(list(row.ids) for row in rows)
    read = min(len(row.ids) - row.targets - 1 for row in rows)
    return min(
        read, _common_length(ordered[0], ordered[-1])
    )  # what the outermost two share, all share


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _keeps_plain_keys(lm: LanguageModel) -> bool:
    """Whether the past is in keys and values alone, those of every layer its own."""
    config = core(lm).config
    try:
        layer_windows(config)
    except ValueError:  # linear attention and its kind
        return False
    return not getattr(config.get_text_config(decoder=True), "num_kv_shared_layers", 0)


def _states(layer: object) -> tuple[Tensor, Tensor]:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    assert isinstance(keys, Tensor)
    assert isinstance(values, Tensor)
    return keys, values


class _PrefixLayer(CacheLayerMixin):
    """A prefix's keys and values, [1, H, P, D], before those of each row of a batch.

    It keeps none of the batch's. Layers with a window get the whole prefix too: masks cut it.
    """

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        CacheLayerMixin.__init__(self)
        self.keys, self.values, self.is_initialized = keys, values, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: it is filled from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of prefix and batch, [B, H, P + T, D]."""
        return _before(self.keys, key_states), _before(self.values, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        assert self.keys is not None
        return int(self.keys.shape[2])

    def get_max_length(self) -> int:
        return -1


def _before(prefix: Tensor | None, states: Tensor) -> Tensor:
    assert prefix is not None
    return torch.cat([prefix.expand(states.shape[0], -1, -1, -1), states], dim=2)
