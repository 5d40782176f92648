"""A transformers Cache that stores keys and values as packed vectors.

Keys are quantised after RoPE, as attention caches them. Everything `update` returns, the tokens of
the same step included, has gone through the storage, so logits measured with this cache are those
of a server that reads only packed pages. Records grow by concatenation, hence their `nbytes` is
tokens × bytes with no slack (decoding the cache at each step costs far more than that copy); pages,
which a GPU attends to, grow by a quarter, and theirs has what is allocated and not yet filled.

A sliding layer keeps what its next step may see, sliding_window - 1 tokens, as transformers'
DynamicSlidingWindowLayer.

All tokens of a step read what its last one would read alone: `recent` ends with the step.

After `activate_past_recording` (assisted generation) tokens may be taken back: until `crop`,
sliding layers keep all tokens, and with a `recent` window each new token is kept in 16 bits beside
its packed vector. `crop` leaves the state that stepping through the remaining tokens leaves.
Meanwhile a step reads what its FIRST token would read alone (the prompt's: its last). So with a
`recent` window accepted drafts read some vectors in 16 bits, and a prompt with drafts some packed,
that plain generation reads the other way: texts may differ. Without one they do not.

Shape suffixes: B sequences, H key/value heads, T tokens, D head size.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

from stillhouse.kernels.turboquant import VectorCodec
from stillhouse.workers.cache.packed_attention import PackedStates
from stillhouse.workers.cache.page_storage import PageStorage
from stillhouse.workers.cache.rows import Rows, append_both
from stillhouse.workers.cache.scheme import CacheScheme, ObliviousScheme
from stillhouse.workers.cache.storage import CacheStorage

_FULL_LAYERS = ("full_attention",)
_SLIDING_LAYERS = ("sliding_attention", "chunked_attention")


class _TurboQuantLayer(CacheLayerMixin):
    """One layer's packed keys and values; `window` is None where attention sees every token."""

    is_croppable = True

    def __init__(
        self,
        scheme: CacheScheme,
        index: int,
        window: int | None,
        padding: Sequence[int] | None,
        attend_packed: bool,
        storage: CacheStorage,
    ) -> None:
        CacheLayerMixin.__init__(self)
        self._attend_packed, self._storage = attend_packed, storage
        self._scheme, self._index, self._window, self._padding = scheme, index, window, padding
        self._rows: tuple[Rows, ...] = ()
        self.is_sliding = window is not None
        self.record_past = False
        self.cumulative_length = 0

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self._rows)

    @property
    def codecs(self) -> list[VectorCodec]:
        return [rows.codec for rows in self._rows]

    @property
    def tables(self) -> list[Any]:
        """Of codecs and kernels; they have `nbytes`, and layers share them."""
        packed = [rows.packed for rows in self._rows]
        return self.codecs + [part.tables for part in packed if isinstance(part, PageStorage)]

    @property
    def batch_size(self) -> int:
        return self._rows[0].batch_size if self._rows else -1

    def activate_past_recording(self) -> None:
        self.record_past = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._initialize(key_states, value_states)

    def _initialize(self, key_BHTD: Tensor, value_BHTD: Tensor) -> tuple[Rows, ...]:
        padding, states = _for_batch(self._padding, key_BHTD.shape[0]), (key_BHTD, value_BHTD)
        key = self._scheme.codec(self._index, "key", key_BHTD)
        value = self._scheme.codec(self._index, "value", value_BHTD)
        packed = self._storage.empty((key, value), states, self._attend_packed)
        self._rows = tuple(
            Rows.empty(part, self._scheme.sinks, self._scheme.recent, padding, x_BHTD)
            for part, x_BHTD in zip(packed, states, strict=True)
        )
        self.is_initialized = True
        return self._rows

    @torch.no_grad()
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        # Stored vectors are what they are: autocast would round them, or refuse their dtype.
        with torch.autocast(key_states.device.type, enabled=False):
            return self._updated(key_states, value_states)

    def _updated(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        before = self._rows or self._initialize(key_states, value_states)
        _, first = self.get_mask_sizes(key_states.shape[2])
        slot = self.cumulative_length
        states = (key_states, value_states)
        self._rows = append_both(before, states, slot, self.record_past)
        self.cumulative_length += key_states.shape[2]
        end, dtype = self.cumulative_length, key_states.dtype
        if self._attend_packed and key_states.shape[2] == 1 and not self.record_past:
            found = PackedStates.of(states, self._rows, (first, end))
            if found is not None:
                self._drop_unseen()
                return found
        # Only matters while tokens may be taken back: drafts must not push others out of `recent`.
        read_at = slot + 1 if slot else end
        keys, values = (rows.decode(first, end, dtype, read_at) for rows in self._rows)
        if not self.record_past:
            self._drop_unseen()
        return keys, values

    def _needed(self, length: int) -> int:
        """How many of the last tokens a step after `length` tokens may see."""
        return length if self._window is None else min(length, self._window - 1)

    def _drop_unseen(self) -> None:
        start = self.cumulative_length - self._needed(self.cumulative_length)
        self._rows = tuple(rows.without_before(start) for rows in self._rows)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        past = self._needed(self.cumulative_length)
        return past + query_length, self.cumulative_length - past

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1 if self._window is None else self._window

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens (a positive number: the length to keep)."""
        length = self.cumulative_length
        removed = max(length - tokens_to_remove, 0) if tokens_to_remove > 0 else -tokens_to_remove
        removed = min(removed, length)
        start = self._rows[0].start if self._rows else length
        if length - removed - start < self._needed(length - removed):
            raise RuntimeError(
                f"expected at least {self._needed(length - removed) + removed} stored tokens to "
                f"remove {removed} of {length}, found {length - start}; call "
                "`activate_past_recording` before the tokens that may be taken back"
            )
        self.cumulative_length = length - removed
        self._rows = tuple(rows.without_last(removed) for rows in self._rows)
        self._drop_unseen()

    def reset(self) -> None:
        self._rows, self.is_initialized, self.cumulative_length = (), False, 0

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        self._rows = tuple(rows.mapped(change) for rows in self._rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_batch(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_batch(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_batch(lambda rows: rows[indices.to(rows.device)])


def _for_batch(padding: Sequence[int] | None, batch: int) -> Sequence[int] | None:
    """The padding of each row; beams repeat their sequence's."""
    if padding is None:
        return None
    if not padding or batch % len(padding):
        raise ValueError(f"expected padding for {batch} sequences, found {len(padding)}")
    return [count for count in padding for _ in range(batch // len(padding))]


class TurboQuantCache(Cache):
    """Packed key/value cache for `generate(past_key_values=…)` and plain forward calls.

    config: of the model (its text part is used); full, sliding and chunked attention layers.
    scheme: the codecs and windows; 4-bit keys `unbiased` and values `least_squares` by default.
    padding: how many pads stand before each sequence, so that its sinks are found; None for no
    left padding. attend_packed: for a model with `PACKED_ATTENTION` set, whose generated tokens
    then read the packed vectors where a CPU or a GPU can, without decoding the cache at each step:
    on CUDA those of a model in 16 bits, from pages. storage: asks for pages, or against them. No
    gradient flows through the cache.

    ValueError: another kind of layer (such as linear attention), keys or values that the scheme
    was not made for, pages where the kernels take none, or on the CPU keys and values that are not
    finite. RuntimeError from `crop`: tokens that a sliding layer has already dropped.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        scheme: CacheScheme | None = None,
        padding: Sequence[int] | None = None,
        attend_packed: bool = False,
        storage: CacheStorage | None = None,
    ) -> None:
        self.scheme = scheme or ObliviousScheme()
        self._packed_layers = [
            _TurboQuantLayer(
                self.scheme, index, window, padding, attend_packed, storage or CacheStorage()
            )
            for index, window in enumerate(layer_windows(config))
        ]
        super().__init__(layers=list(self._packed_layers))

    @property
    def nbytes(self) -> int:
        """Bytes allocated: what every layer stores, slack included, and its tables."""
        return self.table_nbytes + sum(layer.nbytes for layer in self._packed_layers)

    @property
    def table_nbytes(self) -> int:
        """Bytes of the tables of codecs and kernels, which all caches of a scheme share."""
        tables = {id(part): part for layer in self._packed_layers for part in layer.tables}
        return sum(part.nbytes for part in tables.values())

    @property
    def batch_size(self) -> int:
        """B, or -1 before the first step."""
        return self._packed_layers[0].batch_size if self._packed_layers else -1


def layer_windows(config: PreTrainedConfig) -> list[int | None]:
    """How many tokens each layer's attention sees; None for all of them.

    ValueError for a model with other layers than full, sliding and chunked attention.
    """
    kinds, options = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    unknown = sorted(set(kinds) - {*_FULL_LAYERS, *_SLIDING_LAYERS})
    if unknown:
        raise ValueError(
            f"expected layers of {(*_FULL_LAYERS, *_SLIDING_LAYERS)}, found {unknown} in "
            f"{type(config).__name__}; use the 16-bit cache for this model"
        )
    return [option.get("sliding_window") for option in options]


class CacheFactory(Protocol):
    """Makes empty caches of one scheme."""

    def __call__(self, padding: Sequence[int] | None = None) -> TurboQuantCache:
        """A cache for a batch with so many pads before each sequence; None for none."""
        ...
