"""transformers' own QuantizedCache, from its packages, read so that all tokens are quantised.

`QuantizedLayer.update` returns the first call's keys and values as they came, and keeps the last
`residual_length` tokens of later calls in full precision. What a cache costs shows only where
attention reads it: here every update returns what the packed form gives back, and keeps what
transformers keeps.

Shape suffixes: B sequences, H key/value heads, T tokens, D head size.
"""

import importlib.metadata
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import QuantizedCache

_PACKAGES = {"quanto": "optimum-quanto", "hqq": "hqq"}
# transformers' documentation ("KV cache strategies", quantized cache) asks for these axes.
_AXES = {"quanto": 0, "hqq": 1}
# HQQ 0.2.8 reads 3 bits along axis 1 back from matrices only.
_AXIS_OF_3_BITS = 0


class ReadBackCache(QuantizedCache):
    """backend: `quanto` (2 or 4 bits) or `hqq` (1, 2, 3, 4, 8), with transformers' group of 64.

    ImportError when the backend's package is missing; ValueError for a model with layers other
    than full attention.
    """

    table_nbytes = 0

    def __init__(self, backend: str, config: PreTrainedConfig, bits: int) -> None:
        importlib.metadata.version(_PACKAGES[backend])  # transformers' own check of quanto breaks
        axis = _AXIS_OF_3_BITS if bits == 3 else _AXES[backend]
        super().__init__(backend, config, bits, axis_key=axis, axis_value=axis)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As transformers', but returns what was stored; ValueError for what it cannot pack."""
        try:
            super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except RuntimeError as error:  # HQQ: an odd number of groups
            raise ValueError(
                f"expected keys that transformers' cache can pack, found {list(key_states.shape)}: "
                f"{error}"
            ) from error
        layer: Any = self.layers[layer_idx]
        keys = self._read(layer, layer._quantized_keys, layer.keys)
        return keys, self._read(layer, layer._quantized_values, layer.values)

    def _read(self, layer: Any, packed: Any, recent: Tensor) -> Tensor:
        read: Tensor = layer._dequantize(packed)
        return torch.cat((read, recent), dim=2) if recent.numel() else read

    @property
    def nbytes(self) -> int:
        """Bytes of packed values and of tokens not yet quantised; scales and zeros count 16 bits.

        They take the dtype of the model, which on a CPU is often float32; the peer is not charged
        for that.
        """
        layers: list[Any] = list(self.layers)
        packed = [part for layer in layers for part in _parts(layer)]
        return sum(2 * x.numel() if x.is_floating_point() else x.nbytes for x in packed)


def _parts(layer: Any) -> Iterator[Tensor]:
    for packed in (layer._quantized_keys, layer._quantized_values):
        if isinstance(packed, tuple):  # HQQ: packed values, then what belongs to them
            values, meta = packed
            yield from (values, meta["scale"], meta["zero"])
        else:  # quanto
            yield from (packed._data._data, packed._scale, packed._shift)
    yield from (layer.keys, layer.values)
