"""Attention of a generated token over a cache of records, on a CPU.

Shape suffixes: B sequences, H key/value heads, G query heads of each, D head size, C coded
channels.
"""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor

from stillhouse.kernels.paged_attention import FP8, RecordFormat, VectorFormat
from stillhouse.kernels.turboquant import ChannelGroup, FittedCodec, Fp8Codec, Fp8Vectors
from stillhouse.workers.cache.rows import Rows
from stillhouse.workers.cache.visible import ranges, raw_parts

_DECODERS: WeakKeyDictionary[Any, tuple[Any, Any, Any]] = WeakKeyDictionary()


def attend_rows(
    query_BHGD: Tensor,
    rows: tuple[Rows, ...],
    visible: Sequence[tuple[int, int]],
    *,
    scaling: float,
    softcap: float = 0.0,
) -> Tensor:
    """softmax(q · keys · scaling) · values over the slots [first, end) of each sequence.

    query_BHGD: of any floats. Returns float32 [B, H, G, D].
    """
    from stillhouse.kernels.paged_attention import cpu

    keys, values = rows
    codec: Any = keys.codec
    shown: Any = values.codec
    decoder = _decoder(codec, shown, query_BHGD.shape[2], softcap)
    query_BHGD = query_BHGD.float() * (scaling * cpu.LOG2E)
    mean_HD = _mean(codec)
    packed_ranges, raw_ranges = ranges(keys, visible)
    coded_BHGC, raw_BHGD = decoder.attend_with(
        query_BHGD if isinstance(codec, Fp8Codec) else codec.query_in_coded(query_BHGD),
        _packed(keys.packed),
        _packed(values.packed),
        packed_ranges,
        cpu.RawTokens(query_BHGD, raw_parts(rows), raw_ranges, _mean(shown)),
        offset_BHG=None if mean_HD is None else (query_BHGD @ mean_HD[:, :, None])[..., 0],
    )
    packed_BHGD = coded_BHGC if isinstance(shown, Fp8Codec) else shown.from_coded(coded_BHGC)
    out_BHGD: Tensor = raw_BHGD.add_(packed_BHGD)
    return out_BHGD


def _decoder(codec: Any, shown: Any, group: int, softcap: float) -> Any:
    """Kept with the keys' codec: a format's hash takes as long as a small head's attention."""
    from stillhouse.kernels.paged_attention import cpu

    found = _DECODERS.get(codec)
    if found is None or found[0]() is not shown or found[1] != (group, softcap):
        format = RecordFormat.of(_format(codec), _format(shown))
        found = ref(shown), (group, softcap), cpu.decoder(format, group, softcap)
        _DECODERS[codec] = found
    return found[2]


def _format(codec: Any) -> VectorFormat:
    if isinstance(codec, Fp8Codec):
        return VectorFormat((ChannelGroup(codec.head_dim, FP8),))
    return VectorFormat(codec.coded_groups)


def _mean(codec: Any) -> Tensor | None:
    return codec.fit.mean_HD if isinstance(codec, FittedCodec) else None


def _packed(storage: Any) -> Any:
    from stillhouse.kernels.paged_attention.cpu import PackedHalf

    record = storage.record
    if isinstance(record, Fp8Vectors):
        return PackedHalf(record.codes)
    return PackedHalf(record.indices, record.scalars)
