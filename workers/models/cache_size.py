"""Bytes of a key/value cache by format, without torch and without a model.

Counted as it is allocated: every vector of every layer, the tokens and layers that stay in 16 bits,
and the codecs' tables once. tests/workers/test_cache_size.py compares it with TurboQuantCache.
"""

import re
from dataclasses import dataclass

from stillhouse.errors import ConfigError, ModelError
from stillhouse.workers.models.cache_shape import CacheShape, LayerShape


@dataclass(frozen=True, slots=True)
class VectorFormat:
    """How one key or value is stored: bits a coordinate, and bytes beside them (its scalars)."""

    bits: int
    scalars: int = 0

    def nbytes(self, dim: int) -> int:
        """Bytes of a vector of `dim` coordinates."""
        return dim * self.bits // 8 + self.scalars


@dataclass(frozen=True, slots=True)
class StoredFormat:
    """A cache's format. `codec`: ours, with tables and windows in 16 bits; `boundary`: how many of
    the first and of the last layers stay in 16 bits."""

    name: str
    key: VectorFormat
    value: VectorFormat
    codec: bool = False
    boundary: int = 0


@dataclass(frozen=True, slots=True)
class CacheSize:
    """Bytes: vectors in the format, vectors kept in 16 bits beside them, tables."""

    stored: int
    kept: int
    tables: int

    @property
    def total(self) -> int:
        """All in."""
        return self.stored + self.kept + self.tables


_BF16 = VectorFormat(16)
_SCALAR = 2  # float16
_CODEC = re.compile(r"k([1-58])v([1-58])")
_NAMED = {
    "bf16": StoredFormat("bf16", _BF16, _BF16),
    "fp8": StoredFormat("fp8", VectorFormat(8), VectorFormat(8)),
    # vLLM's presets: a norm for a key, scale and zero for a value; 2 layers at each end in bf16
    "vllm:k8v4": StoredFormat("vllm:k8v4", VectorFormat(8), VectorFormat(4, 4), boundary=2),
    "vllm:4bit_nc": StoredFormat(
        "vllm:4bit_nc", VectorFormat(4, 2), VectorFormat(4, 4), boundary=2
    ),
    "vllm:k3v4_nc": StoredFormat(
        "vllm:k3v4_nc", VectorFormat(3, 2), VectorFormat(4, 4), boundary=2
    ),
    "vllm:3bit_nc": StoredFormat(
        "vllm:3bit_nc", VectorFormat(3, 2), VectorFormat(3, 4), boundary=2
    ),
}


def stored_format(name: str) -> StoredFormat:
    """The format of that name; ConfigError for another."""
    if name in _NAMED:
        return _NAMED[name]
    found = _CODEC.fullmatch(name)
    if found is None:
        raise ConfigError(
            f"--format: expected {', '.join(_NAMED)} or k<bits>v<bits> with bits 1 to 5 or 8 "
            f"(k4v4), found {name!r}"
        )
    key, value = (VectorFormat(int(bits), _SCALAR) for bits in found.groups())
    return StoredFormat(name, key, value, codec=True)


def cache_size(
    shape: CacheShape,
    form: StoredFormat,
    tokens: int,
    batch: int = 1,
    sinks: int = 0,
    recent: int = 0,
) -> CacheSize:
    """Bytes after `tokens` tokens in each of `batch` sequences.

    sinks, recent: the first and the last tokens, which a codec's cache keeps in 16 bits and does
    not pack; a sliding layer keeps those of them that it still holds. ModelError for head sizes
    that the format cannot pack.
    """
    stored = kept = 0
    last = len(shape.layers) - form.boundary
    for index, layer in enumerate(shape.layers):
        held = layer.stored(tokens)
        raw = _in_16_bits(layer, tokens, sinks, recent) if form.codec else 0
        if index < form.boundary or index >= last:
            raw = held
        stored += (held - raw) * _token(shape, layer, form.key, form.value)
        kept += raw * _token(shape, layer, _BF16, _BF16)
    tables = _tables(shape, form) if form.codec else 0
    return CacheSize(stored * batch, kept * batch, tables)


def _in_16_bits(layer: LayerShape, tokens: int, sinks: int, recent: int) -> int:
    """How many of the tokens that a layer holds are among the first `sinks` or last `recent`."""
    held = layer.stored(tokens)
    late = min(recent, held)
    early = min(sinks, tokens - late) - (tokens - held)
    return late + max(early, 0)


def _token(shape: CacheShape, layer: LayerShape, key: VectorFormat, value: VectorFormat) -> int:
    for dim, form in ((layer.key_dim, key), (layer.value_dim, value)):
        if form.scalars and dim % 8:
            raise ModelError(
                f"{shape.name}: expected head sizes that are multiples of 8, found {dim}. Only "
                "bf16 and fp8 store it"
            )
    return layer.kv_heads * (key.nbytes(layer.key_dim) + value.nbytes(layer.value_dim))


def _tables(shape: CacheShape, form: StoredFormat) -> int:
    """Of one codec a head size, for keys and for values."""
    keys = {layer.key_dim for layer in shape.layers}
    values = {layer.value_dim for layer in shape.layers}
    return sum(_codec_tables(dim, form.key.bits) for dim in keys) + sum(
        _codec_tables(dim, form.value.bits) for dim in values
    )


def _codec_tables(dim: int, bits: int) -> int:
    """float32: the rotation and its signs, 2^bits centroids and the boundaries between them."""
    return 4 * (dim * dim + dim + 2 * (1 << bits) - 1)
