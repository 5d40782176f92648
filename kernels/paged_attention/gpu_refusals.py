"""What decode attention and the store on a GPU refuse, before any kernel is launched.

Shape suffixes as in `gpu` and `gpu_store`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse.kernels.paged_attention.gpu_configs import has_readable_rows
from stillhouse.kernels.paged_attention.pages import FP8, HalfPage, VectorFormat
from stillhouse.kernels.paged_attention.ptx_pairs import GPU_BITS
from stillhouse.kernels.turboquant import ChannelGroup, Fp8Codec, MseCodec
from stillhouse.kernels.turboquant.inputs import INPUT_DTYPES

HALVES = (torch.float16, torch.bfloat16)


def require_codec(codec: Any) -> VectorFormat:
    """What it makes; ValueError where the Triton kernels neither read nor write that."""
    if isinstance(codec, Fp8Codec):
        return _require_groups((ChannelGroup(codec.head_dim, FP8),))
    groups = getattr(codec, "coded_groups", None)
    if groups is None:
        raise ValueError(
            f"expected an MseCodec, FittedCodec or Fp8Codec, found {type(codec).__name__}"
        )
    if isinstance(codec, MseCodec) and (codec.law != "gaussian" or codec.bits == FP8):
        raise ValueError(
            f"expected a codec of the law 'gaussian' and 2, 3 or 4 bits, found {codec.law!r} and "
            f"{codec.bits} bits"
        )
    return _require_groups(groups)


def _require_groups(groups: Sequence[ChannelGroup]) -> VectorFormat:
    fits = len(groups) == 1 and groups[0].bits in GPU_BITS
    if not fits or not has_readable_rows(groups[0].channels):
        raise ValueError(
            f"expected one group of 64, 80, … 256 channels of {GPU_BITS} bits (8: fp8), found "
            f"{[(group.channels, group.bits) for group in groups]}"
        )
    return VectorFormat(tuple(groups))


def require_bases(bases: Sequence[Any], head_dim: int) -> None:
    """ValueError unless keys and values were made of vectors of that size."""
    for name, basis in zip(("keys", "values"), bases, strict=True):
        if basis.head_dim != head_dim:
            raise ValueError(
                f"expected {name} of a head size of {head_dim}, found a codec of {basis.head_dim}"
            )


def require_decode(
    decoder: Any, query: Tensor, pages: tuple[Tensor, Tensor], sequences: Any, raw: Any
) -> None:
    """ValueError unless shapes, dtypes and devices fit; looks at no element."""
    if query.ndim != 4 or query.dtype not in HALVES or query.shape[-1] != decoder.head_dim:
        raise ValueError(
            f"expected queries [B, H, G, {decoder.head_dim}] in float16 or bfloat16, found "
            f"{query.dtype} {list(query.shape)}"
        )
    batch, heads, _, dim = query.shape
    _require_heads((decoder.key, decoder.value), heads)
    if 0 in query.shape or query.stride()[2:] != (dim, 1):
        raise ValueError(
            "expected a query or more, those of a head contiguous, found "
            f"{list(query.shape)} with strides {query.stride()}"
        )
    halves = (decoder.pages.key, decoder.pages.value)
    for name, half, tensor in zip(("keys", "values"), halves, pages, strict=True):
        _require_pages(name, half, tensor, heads)
    table, first, last = sequences
    if table.dtype != torch.int32 or table.ndim != 2 or table.shape[0] != batch:
        raise _unexpected(f"an int32 table of {batch} rows", table)
    if table.stride(1) != 1:
        raise ValueError(f"expected contiguous rows of a table, found strides {table.stride()}")
    _require_ends(batch, first, last)
    tensors = [query, *pages, *sequences]
    if raw is not None:
        _require_raw(raw, query.dtype, batch, heads, dim)
        tensors += list(raw)
    if len({tensor.device for tensor in tensors}) > 1:
        found = sorted({str(tensor.device) for tensor in tensors})
        raise ValueError(f"expected tensors on one device, found them on {found}")


def require_chunk(
    decoder: Any,
    query: Tensor,
    pages: tuple[Tensor, Tensor],
    sequences: Any,
    chunk: Any,
    group: int,
) -> None:
    """ValueError unless what `gpu_chunk.attend_chunk` is given fits; looks at no element."""
    require_decode(decoder, query, pages, sequences, chunk)
    rows = query.shape[2]
    if group < 1 or rows % group:
        raise ValueError(f"expected rows of {group} queries a token, found {rows}")
    if chunk.key_BHRD.shape[2] < rows // group:
        raise ValueError(
            f"expected raw tokens of {rows // group} queries' tokens or more, found "
            f"{chunk.key_BHRD.shape[2]}"
        )


def require_places(sequences: Any, chunk: Any, tokens: int) -> None:
    """ValueError unless chunks stand past their history and hide old raw tokens alone; waits."""
    if bool((chunk.position_B < sequences.last_B).any()):
        raise ValueError(
            f"expected chunks past history's ends {sequences.last_B.tolist()}, found them at "
            f"{chunk.position_B.tolist()}"
        )
    before = chunk.key_BHRD.shape[2] - tokens
    hidden = chunk.hidden_B.tolist()
    if not all(0 <= count <= before for count in hidden):
        raise ValueError(f"expected up to {before} hidden raw tokens, found {hidden}")


def require_table(page: int, pages: tuple[Tensor, Tensor], sequences: Any, raw: Any) -> None:
    """ValueError for ranges past the table, pages that do not exist and raw tokens likewise.

    Waits for the device.
    """
    table, first, last = sequences
    room = table.shape[1] * page
    _require_within("tokens", first, last, room)
    count = min(half.shape[0] for half in pages)
    place = torch.arange(table.shape[1], device=table.device) * page
    used = (place < last[:, None]) & (place + page > first[:, None])
    found = table[used & (first < last)[:, None]]
    if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < count:
        raise ValueError(
            f"expected pages from 0 to {count - 1}, found {int(found.min())} to {int(found.max())}"
        )
    if raw is not None:
        _require_within("raw tokens", raw.first_B, raw.last_B, raw.key_BHRD.shape[2])


def require_store(
    store: Any, vectors: tuple[Tensor, Tensor], pages: tuple[Tensor, Tensor], slots: Tensor
) -> None:
    """ValueError unless shapes, dtypes and devices fit; looks at no element."""
    tokens, heads = vectors[0].shape[:2] if vectors[0].ndim == 3 else (0, 0)
    wanted = (tokens, heads, store.head_dim)
    for name, x in zip(("keys", "values"), vectors, strict=True):
        if x.dtype not in INPUT_DTYPES or x.shape != wanted:
            raise _unexpected(
                f"{name} [T, H, D] in float32, float16 or bfloat16, {list(wanted)}", x
            )
        if x.stride(-1) != 1:
            raise ValueError(f"expected contiguous {name}, found vectors with strides {x.stride()}")
    _require_heads((store.key, store.value), heads)
    halves = (store.pages.key, store.pages.value)
    for name, half, tensor in zip(("keys", "values"), halves, pages, strict=True):
        _require_pages(name, half, tensor, heads)
    wide = slots.dtype in (torch.int32, torch.int64) and slots.shape == (tokens,)
    if not wide or not slots.is_contiguous():
        raise _unexpected(f"contiguous slots, int32 or int64 [{tokens}]", slots)
    for tensor in (*vectors, *pages, slots):
        if tensor.device != store.device:
            raise ValueError(f"expected tensors on {store.device}, found one on {tensor.device}")


def require_slots(page: int, pages: tuple[Tensor, Tensor], slots: Tensor) -> None:
    """ValueError for slots below -1 and in pages that do not exist. Waits for the device."""
    limit = min(half.shape[0] for half in pages) * page
    if slots.numel() and not -1 <= int(slots.min()) <= int(slots.max()) < limit:
        raise ValueError(
            f"expected slots from -1 to {limit - 1}, found {int(slots.min())} to {int(slots.max())}"
        )


def _require_heads(halves: Sequence[Any], heads: int) -> None:
    for half in halves:
        if half.heads not in (None, heads):
            raise ValueError(f"expected {half.heads} heads, one for each map, found {heads}")


def _require_within(name: str, first: Tensor, last: Tensor, room: int) -> None:
    if int(first.min()) < 0 or int(last.max()) > room:
        raise ValueError(
            f"expected ranges within {room} {name}, found "
            f"{list(zip(first.tolist(), last.tolist(), strict=True))}"
        )


def _require_pages(name: str, half: HalfPage, tensor: Tensor, heads: int) -> None:
    fits = tensor.dtype == torch.uint8 and tensor.ndim == 3 and tensor.stride(-1) == 1
    if not fits or tensor.shape[1:] != (heads, half.nbytes):
        raise ValueError(
            f"expected half pages of {name}, uint8 [N, {heads}, {half.nbytes}], each contiguous, "
            f"found {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
        )
    if tensor.data_ptr() % 16 or any(stride % 16 for stride in tensor.stride()[:2]):
        raise ValueError(
            f"expected half pages of {name} that begin at multiples of 16 bytes, found strides "
            f"{tensor.stride()} from address {tensor.data_ptr() % 16} modulo 16"
        )


def _require_ends(batch: int, *ends: Tensor) -> None:
    for end in ends:
        if end.dtype != torch.int32 or end.shape != (batch,) or not end.is_contiguous():
            raise _unexpected(f"the ends of ranges, int32 [{batch}]", end)


def _require_raw(raw: Any, dtype: torch.dtype, batch: int, heads: int, dim: int) -> None:
    key, value, first, last = raw
    wanted = (batch, heads, key.shape[2] if key.ndim == 4 else 0, dim)
    for name, tensor in (("keys", key), ("values", value)):
        fits = tensor.dtype == dtype and tensor.shape == wanted
        if not fits or tensor.stride()[2:] != (dim, 1):
            raise _unexpected(
                f"raw {name} {list(wanted)} in the queries' {dtype}, contiguous a head", tensor
            )
    _require_ends(batch, first, last)


def _unexpected(wanted: str, found: Tensor) -> ValueError:
    return ValueError(f"expected {wanted}, found {found.dtype} {list(found.shape)}")
