"""Attention of a generated token over a cache in pages, on a GPU.

The host waits for the device only where there is a mask, as of a padded batch or a full window.

Shape suffixes: B sequences, H key/value heads, G query heads of each, S sinks, R sinks and recent
tokens, D head size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse.workers.cache.page_storage import PageStorage
from stillhouse.workers.cache.rows import Rows
from stillhouse.workers.cache.visible import ranges, raw_parts


def attend_pages(
    query_BHGD: Tensor,
    rows: tuple[Rows, ...],
    visible: Sequence[tuple[int, int]],
    *,
    scaling: float,
    softcap: float = 0.0,
) -> Tensor:
    """softmax(q · keys · scaling) · values over the slots [first, end) of each sequence.

    query_BHGD: float32, float16 or bfloat16. Returns [B, H, G, D] in the 16 bits of the cache.
    """
    from stillhouse.kernels.paged_attention.gpu import RawTokens, Sequences

    keys, values = (part.packed for part in rows)
    assert isinstance(keys, PageStorage)
    assert isinstance(values, PageStorage)
    keys.require_twin(values)
    packed, raw_ranges = ranges(rows[0], visible)
    raw = _raw_tokens(rows, raw_ranges)
    shown = [(keys.first + begin, keys.first + end) for begin, end in packed]
    device = query_BHGD.device
    out_BHGD, _ = keys.tables.decoder(scaling, softcap).attend(
        _with_plain_strides(query_BHGD.to(rows[0].recent_BHTD.dtype)),
        keys.all_pages,
        values.all_pages,
        Sequences(keys.table_BW, *ends_of(shown, device)),
        raw=None if raw is None else RawTokens(raw[0][0], raw[0][1], *ends_of(raw[1], device)),
        tokens=rounded_up(max(end - begin for begin, end in packed)),
        trusted=True,  # the ranges are the cache's own
    )
    return out_BHGD


def rounded_up(tokens: int) -> int:
    """To a power of two: kernels are compiled for each number of splits, which follows from it."""
    return 1 << (max(tokens, 1) - 1).bit_length()


def ends_of(found: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each sequence the first and the last, int32 [B] both."""
    options: dict[str, Any] = {"dtype": torch.int32, "device": device}
    if len(set(found)) == 1:  # nothing is copied from the host
        first, last = (torch.full((len(found),), end, **options) for end in found[0])
        return first, last
    first, last = (torch.tensor(ends, **options) for ends in zip(*found, strict=True))
    return first, last


def _with_plain_strides(x_BHRD: Tensor) -> Tensor:
    """Each head's vectors behind one another: a tensor of one row may have any stride there."""
    if x_BHRD.stride()[2:] == (x_BHRD.shape[3], 1):
        return x_BHRD
    return x_BHRD.clone(memory_format=torch.contiguous_format)


def _raw_tokens(
    rows: tuple[Rows, ...], found: Sequence[tuple[int, int, int, int]]
) -> tuple[list[Tensor], list[tuple[int, int]]] | None:
    """Keys and values in 16 bits, sinks first, and of each sequence the range that is seen."""
    parts = list(zip(*raw_parts(rows), strict=True))
    sinks, recent = (part.shape[2] for part in parts[0])
    if not sinks + recent:
        return None
    places = [_place(one, sinks) for one in found]
    joined = [_with_plain_strides(torch.cat(part, dim=2)) for part in parts]
    shifts = [shift for shift, _, _ in places]
    if any(shifts):
        joined = [_shifted(x_BHRD, sinks, shifts) for x_BHRD in joined]
    return joined, [(first, last) for _, first, last in places]


def _place(found: tuple[int, int, int, int], sinks: int) -> tuple[int, int, int]:
    """How far sinks move to meet the recent tokens that are seen, and the range of both."""
    first_sink, last_sink, first_recent, recent = found
    if first_recent == recent:
        return 0, first_sink, last_sink
    if first_sink >= last_sink:
        return 0, sinks + first_recent, sinks + recent
    return first_recent, first_sink + first_recent, sinks + recent


def _shifted(x_BHRD: Tensor, sinks: int, shifts: Sequence[int]) -> Tensor:
    """Each sequence's sinks, moved over so many recent tokens that it does not see."""
    place_R = torch.arange(x_BHRD.shape[2], device=x_BHRD.device)
    shift_B1 = torch.tensor(shifts, device=x_BHRD.device)[:, None]
    moved_BR = (place_R - shift_B1).clamp_min(0)
    source_BR = torch.where(place_R < sinks + shift_B1, moved_BR, place_R)
    return x_BHRD.gather(2, source_BR[:, None, :, None].expand_as(x_BHRD))
