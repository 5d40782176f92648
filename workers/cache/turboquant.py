"""A transformers Cache that stores keys and values as packed TurboQuant vectors, nothing else.

Keys are quantised after RoPE, as attention caches them. Everything `update` returns, the tokens of
the same step included, has gone through the packed storage, so logits measured with this cache are
those of a server that reads only packed pages. Storage grows by concatenation, hence `nbytes` is
tokens × bytes with no slack (decoding the cache at each step costs far more than that copy).

A sliding layer keeps what its next step may see, sliding_window - 1 tokens, as transformers'
DynamicSlidingWindowLayer; after `activate_past_recording` it keeps all tokens until `crop`.

Shape suffixes: B sequences, H key/value heads, T tokens, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

from stillhouse.kernels.turboquant import MseCodec, PackedVectors, ScalarKind

_FULL_LAYERS = ("full_attention",)
_SLIDING_LAYERS = ("sliding_attention", "chunked_attention")


@dataclass(frozen=True, slots=True)
class CacheFormat:
    """Bits (1…5 or 8) and stored scalar of keys and of values; the seed of the rotation's signs."""

    key_bits: int = 4
    value_bits: int = 4
    key_scalar: ScalarKind = "unbiased"
    value_scalar: ScalarKind = "least_squares"
    seed: int = 0


@dataclass(slots=True)
class _CodecTables:
    """The codecs of one cache, shared by its layers: one a (head size, K or V, device)."""

    format: CacheFormat
    codecs: dict[tuple[int, str, torch.device], MseCodec] = field(default_factory=dict)

    def codec(self, kind: str, sample_D: Tensor) -> MseCodec:
        head_dim, device = sample_D.shape[-1], sample_D.device
        key = (head_dim, kind, device)
        if key not in self.codecs:
            bits = self.format.key_bits if kind == "key" else self.format.value_bits
            scalar = self.format.key_scalar if kind == "key" else self.format.value_scalar
            seed = self.format.seed
            self.codecs[key] = MseCodec(head_dim, bits, scalar, seed, device=device)
        return self.codecs[key]


class _PackedRows:
    """The packed vectors [B, H, T] of one layer's keys or values."""

    def __init__(self, codec: MseCodec, sample_BHTD: Tensor) -> None:
        self._codec = codec
        self._packed = codec.encode(sample_BHTD[:, :, :0])

    @property
    def length(self) -> int:
        return self._packed.scalars.shape[2]

    @property
    def batch_size(self) -> int:
        return self._packed.scalars.shape[0]

    @property
    def nbytes(self) -> int:
        return self._packed.nbytes

    def encode(self, x_BHTD: Tensor) -> PackedVectors:
        return self._codec.encode(x_BHTD)

    def append(self, new: PackedVectors) -> None:
        indices = torch.cat((self._packed.indices, new.indices), dim=2)
        scalars = torch.cat((self._packed.scalars, new.scalars), dim=2)
        self._packed = PackedVectors(indices, scalars)

    def decode_last(self, tokens: int, dtype: torch.dtype) -> Tensor:
        """The last `tokens` tokens (fewer when there are fewer), [B, H, T, D]."""
        start = max(self.length - tokens, 0)
        indices, scalars = self._packed.indices, self._packed.scalars
        return self._codec.decode(
            PackedVectors(indices[:, :, start:], scalars[:, :, start:]), dtype
        )

    def keep(self, start: int, stop: int) -> None:
        if start > 0 or stop < self.length:
            self.map(lambda rows: rows[:, :, start:stop].clone())  # a view would free nothing

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        self._packed = PackedVectors(change(self._packed.indices), change(self._packed.scalars))


class _TurboQuantLayer(CacheLayerMixin):
    """One layer's packed keys and values; `window` is None where attention sees every token."""

    is_croppable = True

    def __init__(self, tables: _CodecTables, window: int | None) -> None:
        CacheLayerMixin.__init__(self)
        self._tables, self._window = tables, window
        self._rows: tuple[_PackedRows, _PackedRows] | None = None
        self.is_sliding = window is not None
        self.record_past = False
        self.cumulative_length = 0

    @property
    def nbytes(self) -> int:
        return 0 if self._rows is None else sum(rows.nbytes for rows in self._rows)

    @property
    def batch_size(self) -> int:
        return -1 if self._rows is None else self._rows[0].batch_size

    @property
    def stored_length(self) -> int:
        return 0 if self._rows is None else self._rows[0].length

    def activate_past_recording(self) -> None:
        self.record_past = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._initialize(key_states, value_states)

    def _initialize(self, key_BHTD: Tensor, value_BHTD: Tensor) -> tuple[_PackedRows, _PackedRows]:
        keys = _PackedRows(self._tables.codec("key", key_BHTD), key_BHTD)
        values = _PackedRows(self._tables.codec("value", value_BHTD), value_BHTD)
        self._rows, self.is_initialized = (keys, values), True
        return self._rows

    @torch.no_grad()
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self._rows or self._initialize(key_states, value_states)
        visible, _ = self.get_mask_sizes(key_states.shape[2])
        # Both are encoded before one is stored: a refused value leaves the cache as it was.
        new_keys, new_values = keys.encode(key_states), values.encode(value_states)
        keys.append(new_keys)
        values.append(new_values)
        self.cumulative_length += key_states.shape[2]
        decoded = (
            keys.decode_last(visible, key_states.dtype),
            values.decode_last(visible, value_states.dtype),
        )
        if not self.record_past:
            self._drop_unseen()
        return decoded

    def _needed(self, length: int) -> int:
        """How many of the last tokens a step after `length` tokens may see."""
        return length if self._window is None else min(length, self._window - 1)

    def _drop_unseen(self, removed: int = 0) -> None:
        stored, needed = self.stored_length, self._needed(self.cumulative_length)
        for rows in self._rows or ():
            rows.keep(stored - removed - needed, stored - removed)

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
        if self.stored_length - removed < self._needed(length - removed):
            raise RuntimeError(
                f"expected at least {self._needed(length - removed) + removed} stored tokens to "
                f"remove {removed} of {length}, found {self.stored_length}; call "
                "`activate_past_recording` before the tokens that may be taken back"
            )
        self.cumulative_length = length - removed
        self._drop_unseen(removed)

    def reset(self) -> None:
        self._rows, self.is_initialized, self.cumulative_length = None, False, 0

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        for rows in self._rows or ():
            rows.map(change)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_batch(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_batch(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_batch(lambda rows: rows[indices.to(rows.device)])


class TurboQuantCache(Cache):
    """Packed key/value cache for `generate(past_key_values=…)` and plain forward calls.

    config: of the model (its text part is used); full, sliding and chunked attention layers.
    format: bits and scalars; 4-bit keys `unbiased` and values `least_squares` by default. Head
    sizes are multiples of 8. No gradient flows through the cache.

    ValueError: another kind of layer (such as linear attention), or on the CPU keys or values that
    are not finite. RuntimeError from `crop`: tokens that a sliding layer has already dropped.
    """

    def __init__(self, config: PreTrainedConfig, format: CacheFormat | None = None) -> None:
        self.format = format or CacheFormat()
        self._tables = _CodecTables(self.format)
        kinds, options = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        unknown = sorted(set(kinds) - {*_FULL_LAYERS, *_SLIDING_LAYERS})
        if unknown:
            raise ValueError(
                f"expected layers of {(*_FULL_LAYERS, *_SLIDING_LAYERS)}, found {unknown} in "
                f"{type(config).__name__}; use the 16-bit cache for this model"
            )
        self._packed_layers = [
            _TurboQuantLayer(self._tables, option.get("sliding_window")) for option in options
        ]
        super().__init__(layers=list(self._packed_layers))

    @property
    def nbytes(self) -> int:
        """Bytes allocated: packed indices and scalars of every layer, and the codecs' tables."""
        tables = sum(codec.nbytes for codec in self._tables.codecs.values())
        return tables + sum(layer.nbytes for layer in self._packed_layers)

    @property
    def batch_size(self) -> int:
        """B, or -1 before the first step."""
        return self._packed_layers[0].batch_size if self._packed_layers else -1
