"""Bytes of a key/value cache by format, without torch and without a model.

Counted as it is allocated: every vector of every layer, the tokens and layers that stay in 16 bits,
and the codecs' tables once. tests/workers/test_cache_size.py compares it with TurboQuantCache. Of a
fitted cache, whose calibration shares the bytes out, both figures are the most that it takes. What
compiled loops lay out anew of a table, small and another on each device, is not counted.
"""

import math
from dataclasses import dataclass
from typing import Literal

from stillhouse.errors import ConfigError, ModelError
from stillhouse.workers.cache_quality.formats import parse_format
from stillhouse.workers.models.cache_shape import CacheShape, LayerShape


@dataclass(frozen=True, slots=True)
class VectorSize:
    """How one key or value is stored: bits a coordinate, bytes beside them (its scalars), and what
    head sizes are multiples of."""

    bits: float
    scalars: int = 0
    multiple: int = 1

    def nbytes(self, dim: int) -> float:
        """Bytes of a vector of `dim` coordinates; of a fitted one the mean over all, not whole."""
        return dim * self.bits / 8 + self.scalars


Tables = Literal["none", "shared", "fitted"]


@dataclass(frozen=True, slots=True)
class StoredFormat:
    """A cache's format. `tables`: of none, of one codec a head size, or of every head of every
    layer; with tables it is ours, and has windows in 16 bits. `boundary`: how many of the first
    and of the last layers stay in 16 bits."""

    name: str
    key: VectorSize
    value: VectorSize
    tables: Tables = "none"
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


_BF16, _FP8 = VectorSize(16), VectorSize(8)
_PLAIN = StoredFormat("bf16", _BF16, _BF16)
_SCALAR = 2  # float16
# A norm for a key, scale and zero for a value, as in workers/cache/vllm_presets.py.
_VLLM = {
    "k8v4": (_FP8, VectorSize(4, 4, 8)),
    "4bit_nc": (VectorSize(4, 2, 8), VectorSize(4, 4, 8)),
    "k3v4_nc": (VectorSize(3, 2, 8), VectorSize(4, 4, 8)),
    "3bit_nc": (VectorSize(3, 2, 8), VectorSize(3, 4, 8)),
}
_VLLM_BOUNDARY = 2


def stored_format(name: str) -> StoredFormat:
    """The format of a name as `bench cache-quality` has them; ConfigError for another."""
    try:
        asked = parse_format(name)
    except ConfigError:
        raise _unknown(name) from None
    match asked.family, asked.preset or asked.bits:
        case "bf16", _:
            return _PLAIN
        case "fp8", _:
            return StoredFormat(name, _FP8, _FP8)
        case "vllm", str(preset):
            boundary = 0 if asked.all_layers else _VLLM_BOUNDARY
            return StoredFormat(name, *_VLLM[preset], boundary=boundary)
        case "mse", (key, value):
            return StoredFormat(name, _mse(key), _mse(value), "shared")
        case "fitted", (bits, _) if 1 <= bits <= 5:
            fitted = VectorSize(bits, _SCALAR, 8)
            return StoredFormat(name, fitted, fitted, "fitted")
    raise _unknown(name)


def _unknown(name: str) -> ConfigError:
    return ConfigError(
        "--format: expected bf16, fp8, k<bits>v<bits> or mse:<bits> with bits 1 to 5 or 8 (k4v4; "
        "mse to 4.5 in halves), fitted:<bits> with bits from 1 to 5, vllm:<preset> or "
        f"vllm:<preset>:all with a preset of {', '.join(_VLLM)}, found {name!r:.60}"
    )


def _mse(bits: float) -> VectorSize:
    """Half bits: two sets of channels of equal size, each with its scalar."""
    return VectorSize(bits, *((_SCALAR, 8) if bits == int(bits) else (2 * _SCALAR, 16)))


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
    not pack; a sliding layer keeps those of them that it still holds. A fitted cache is taken to be
    calibrated for `tokens` tokens, and its values' maps to lie in the model's weights (`value_maps`
    otherwise). ModelError for head sizes that the format cannot pack.
    """
    stored, kept = 0.0, 0.0
    ends = min(form.boundary, len(shape.layers) // 2)
    inner = range(ends, len(shape.layers) - ends)
    for index, layer in enumerate(shape.layers):
        held = layer.stored(tokens)
        raw = _in_16_bits(layer, tokens, sinks, recent) if form.tables != "none" else 0
        if index not in inner:
            raw = held
        stored += (held - raw) * _token(shape, layer, form)
        kept += raw * _token(shape, layer, _PLAIN)
    return CacheSize(math.ceil(stored * batch), math.ceil(kept * batch), _tables(shape, form))


def value_maps(shape: CacheShape, form: StoredFormat) -> int:
    """Bytes of the maps that a fitted cache's tables have besides where no value folds."""
    if form.tables != "fitted":
        return 0
    return sum(_maps(layer.kv_heads, layer.value_dim) for layer in shape.layers)


def _in_16_bits(layer: LayerShape, tokens: int, sinks: int, recent: int) -> int:
    """How many of the tokens that a layer holds are among the first `sinks` or last `recent`."""
    held = layer.stored(tokens)
    late = min(recent, held)
    early = min(sinks, tokens - late) - (tokens - held)
    return late + max(early, 0)


def _token(shape: CacheShape, layer: LayerShape, form: StoredFormat) -> float:
    for dim, part in ((layer.key_dim, form.key), (layer.value_dim, form.value)):
        if dim % part.multiple:
            raise ModelError(
                f"{shape.name}: expected head sizes that are multiples of {part.multiple}, found "
                f"{dim}. {form.name} does not store it; bf16 and fp8 do"
            )
    return layer.kv_heads * (form.key.nbytes(layer.key_dim) + form.value.nbytes(layer.value_dim))


def _tables(shape: CacheShape, form: StoredFormat) -> int:
    if form.tables == "none":
        return 0
    if form.tables == "fitted":
        return sum(_fitted_tables(layer) for layer in shape.layers)
    keys = {layer.key_dim for layer in shape.layers}
    values = {layer.value_dim for layer in shape.layers}
    return sum(_codec_tables(dim, form.key.bits) for dim in keys) + sum(
        _codec_tables(dim, form.value.bits) for dim in values
    )


def _codec_tables(dim: int, bits: float) -> int:
    """float32: the rotation and its signs, centroids and boundaries; of a split both codecs' and
    the channels' order, int64."""
    low = int(bits)
    if bits != low:
        order = 2 * 8 * dim  # the two sets, and each channel's place in them
        return _codec_tables(dim // 2, low + 1) + _codec_tables(dim // 2, low) + order
    return 4 * (dim * dim + dim) + _book(low)


def _fitted_tables(layer: LayerShape) -> int:
    """float32: mean and weight of every head, the keys' maps, codebooks of three groups at most."""
    vectors = 4 * layer.kv_heads * 2 * (layer.key_dim + layer.value_dim)
    books = 2 * sum(map(_book, (5, 4, 3)))
    return vectors + _maps(layer.kv_heads, layer.key_dim) + books


def _maps(heads: int, dim: int) -> int:
    """float32: a map and its inverse for every head."""
    return 4 * heads * 2 * dim * dim


def _book(bits: int) -> int:
    """float32: 2^bits centroids and the boundaries between them."""
    return 4 * (2 * (1 << bits) - 1)
