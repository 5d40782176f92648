"""Attention of a generated token over a cache of records, on a CPU.

Shape suffixes: B sequences, H key/value heads, G query heads of each, D head size, C coded
channels.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor

from stillhouse.kernels.paged_attention import FP8, RecordFormat, VectorFormat
from stillhouse.kernels.paged_attention.units import LOG2E
from stillhouse.kernels.turboquant import ChannelGroup, FittedCodec, Fp8Codec, Fp8Vectors
from stillhouse.workers.cache.rows import Rows
from stillhouse.workers.cache.visible import ranges, raw_parts

if TYPE_CHECKING:
    from stillhouse.kernels.paged_attention.cpu import PackedDecoder, PackedHalf
    from stillhouse.kernels.paged_attention.cpu_plan import DecodePlan

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
    from stillhouse.kernels.paged_attention.cpu_plan import DecodePlan

    keys, values = rows
    heads, group = query_BHGD.shape[1:3]
    return attend_halves(
        _decoder(keys.codec, values.codec, group, softcap),
        (keys.codec, values.codec),
        query_BHGD.float() * (scaling * LOG2E),
        (_packed(keys.packed), _packed(values.packed)),
        DecodePlan(*ranges(keys, visible), heads, group),
        raw_parts(rows),
    )


def attend_halves(
    decoder: "PackedDecoder",
    codecs: tuple[Any, Any],
    query_BHGD: Tensor,
    halves: "tuple[PackedHalf, PackedHalf]",
    plan: "DecodePlan",
    raw_parts: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """As `attend_rows`, over records or pages of keys and of values.

    query_BHGD: float32, times the softmax scale and log2 e.
    """
    from stillhouse.kernels.paged_attention.cpu import RawTokens

    keys, values = codecs
    mean_HD = mean_of(keys)
    coded_BHGC, raw_BHGD = decoder.attend(
        query_BHGD if isinstance(keys, Fp8Codec) else keys.query_in_coded(query_BHGD),
        *halves,
        plan,
        RawTokens(query_BHGD, raw_parts, mean_of(values)),
        offset_BHG=None if mean_HD is None else (query_BHGD @ mean_HD[:, :, None])[..., 0],
    )
    packed_BHGD = coded_BHGC if isinstance(values, Fp8Codec) else values.from_coded(coded_BHGC)
    out_BHGD: Tensor = raw_BHGD.add_(packed_BHGD)
    return out_BHGD


def _decoder(codec: Any, shown: Any, group: int, softcap: float) -> Any:
    """Kept with the keys' codec: a format's hash takes as long as a small head's attention."""
    from stillhouse.kernels.paged_attention import cpu

    found = _DECODERS.get(codec)
    if found is None or found[0]() is not shown or found[1] != (group, softcap):
        format = RecordFormat.of(vector_format(codec), vector_format(shown))
        found = ref(shown), (group, softcap), cpu.decoder(format, group, softcap)
        _DECODERS[codec] = found
    return found[2]


def vector_format(codec: Any) -> VectorFormat:
    """Of its coded vectors."""
    if isinstance(codec, Fp8Codec):
        return VectorFormat((ChannelGroup(codec.head_dim, FP8),))
    return VectorFormat(codec.coded_groups)


def mean_of(codec: Any) -> Tensor | None:
    """float32 [H, D], what decoding adds; None for nothing."""
    return codec.fit.mean_HD if isinstance(codec, FittedCodec) else None


def _packed(storage: Any) -> Any:
    from stillhouse.kernels.paged_attention.cpu import PackedHalf

    record = storage.record
    if isinstance(record, Fp8Vectors):
        return PackedHalf(record.codes)
    return PackedHalf(record.indices, record.scalars)
