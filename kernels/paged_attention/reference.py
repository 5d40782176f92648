"""Decode attention over packed pages by the definition, in float64, one sequence and head a time.

Shape suffixes: B sequences, H key/value heads, G queries of each, N pages, Y bytes of a page, T
tokens, C coded channels of a key, V of a value.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse.kernels.paged_attention.pages import PageFormat, VectorFormat, read_vectors
from stillhouse.kernels.turboquant import gaussian_codebook, packed_bytes, unpack


def coded_vectors(packed_HTP: Tensor, scalars_HT: Tensor | None, format: VectorFormat) -> Tensor:
    """float64 [H, T, C]: centroids times scalar / √C, or the fp8 numbers."""
    if scalars_HT is None:
        numbers: Tensor = packed_HTP.view(torch.float8_e4m3fn).double()
        return numbers
    parts, at = [], 0
    for group in format.groups:
        stop = at + packed_bytes(group.channels, group.bits)
        index = unpack(packed_HTP[..., at:stop].contiguous(), group.bits, group.channels)
        centroids = gaussian_codebook(group.bits).centroids
        book = torch.tensor(centroids, dtype=torch.float64, device=index.device)
        parts.append(book[index.long()])
        at = stop
    unit_HTC = torch.cat(parts, -1) / math.sqrt(format.channels)
    return unit_HTC * scalars_HT.double()[..., None]


def softmax_sums(
    query_HGC: Tensor,
    key_HTC: Tensor,
    value_HTV: Tensor,
    *,
    softcap: float = 0.0,
    offset_HG: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """m, l and Σ exp(s - m) · value of one sequence, float64; see `cpu.PackedDecoder.attend`."""
    heads, group, _ = query_HGC.shape
    if not key_HTC.shape[1]:
        lowest = torch.full((heads, group), -1e30 * math.log(2), dtype=torch.float64)
        nothing = torch.zeros((heads, group, value_HTV.shape[-1]), dtype=torch.float64)
        return lowest, torch.zeros_like(lowest), nothing
    score_HGT = query_HGC.double() @ key_HTC.mT
    if offset_HG is not None:
        score_HGT = score_HGT + offset_HG.double()[..., None]
    if softcap:
        score_HGT = softcap * torch.tanh(score_HGT / softcap)
    m_HG = score_HGT.amax(-1)
    weight_HGT = (score_HGT - m_HG[..., None]).exp()
    return m_HG, weight_HGT.sum(-1), weight_HGT @ value_HTV


def attend_packed_reference(
    query_BHGC: Tensor,
    keys_NHY: Tensor,
    values_NHY: Tensor,
    pages: PageFormat,
    table_BW: Tensor,
    ranges: Sequence[tuple[int, int]],
    *,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """m, l and sums of values over pages, as `cpu.PackedDecoder.attend`, all float64."""
    found = []
    for b, (first, last) in enumerate(ranges):
        at_T = torch.arange(first, max(first, last))
        slots_T = table_BW[b, at_T // pages.tokens].long() * pages.tokens + at_T % pages.tokens
        key_HTC = coded_vectors(*read_vectors(keys_NHY, pages.key, slots_T), pages.key.format)
        value_HTV = coded_vectors(
            *read_vectors(values_NHY, pages.value, slots_T), pages.value.format
        )
        found.append(softmax_sums(query_BHGC[b], key_HTC, value_HTV, softcap=softcap))
    m, total, out = (torch.stack(parts) for parts in zip(*found, strict=True))
    return m, total, out


def attend_reference(
    query_BHGD: Tensor,
    coded: Sequence[tuple[Tensor, Tensor]],
    basis: tuple[Any, Any],
    *,
    scaling: float,
    softcap: float = 0.0,
    raw: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """The whole of `gpu.GpuDecoder.attend`: [B, H, G, D] and [B, H, G], float64.

    coded: keys [H, T, C] and values [H, T, V] of each sequence, as `coded_vectors` has them. basis:
    `gpu.CodedBasis` of both. raw: keys and values [H, R, D] of each sequence.
    """
    outs, sums = [], []
    for b, (key_HTC, value_HTV) in enumerate(coded):
        decoded = [_times(key_HTC, basis[0].into_HDC, True), _times(value_HTV, basis[1].back_HCD)]
        for place in range(2):
            if basis[place].mean_HD is not None:
                decoded[place] = decoded[place] + basis[place].mean_HD.double()[:, None]
            if raw is not None:
                decoded[place] = torch.cat((decoded[place], raw[b][place].double()), dim=1)
        score_HGT = query_BHGD[b].double() @ decoded[0].mT * scaling
        if softcap:
            score_HGT = softcap * torch.tanh(score_HGT / softcap)
        seen = score_HGT.shape[-1] > 0
        sums.append(score_HGT.logsumexp(-1) if seen else score_HGT.sum(-1) - math.inf)
        outs.append(score_HGT.softmax(-1) @ decoded[1])
    return torch.stack(outs), torch.stack(sums)


def _times(coded_HTC: Tensor, map_H: Tensor | None, transposed: bool = False) -> Tensor:
    if map_H is None:
        return coded_HTC
    product: Tensor = coded_HTC @ (map_H.double().mT if transposed else map_H.double())
    return product


def chunk_shares(
    query_HMC: Tensor,
    key_HTC: Tensor,
    value_HTV: Tensor,
    raw: tuple[Tensor, Tensor, Tensor],
    *,
    group: int,
    position: int,
    first: int = 0,
    hidden: int = 0,
    window: int = 0,
    softcap: float = 0.0,
    offset_HM: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A chunk's attention over history and raw tokens, of one sequence, float64.

    raw: queries [H, M, D], keys and values [H, R, D]. Returns what `cpu_chunk.ChunkDecoder.attend`
    does, without the batch.
    """
    query_HMD, raw_key_HRD, raw_value_HRD = (part.double() for part in raw)
    rows, count, history = query_HMC.shape[1], raw_key_HRD.shape[1], key_HTC.shape[1]
    token_M1 = (torch.arange(rows) // group)[:, None]
    packed_HMT = query_HMC.double() @ key_HTC.mT
    if offset_HM is not None:
        packed_HMT = packed_HMT + offset_HM.double()[..., None]
    score = torch.cat((packed_HMT, query_HMD @ raw_key_HRD.mT), dim=-1)
    if softcap:
        score = softcap * torch.tanh(score / softcap)
    before = count - rows // group
    place = torch.cat((torch.arange(history), torch.arange(count) + position - before))
    seen = place <= position + token_M1
    if window:
        seen &= place > position + token_M1 - window
    seen[:, :history] &= torch.arange(history) >= first
    seen[:, history:] &= torch.arange(count) >= hidden
    share = score.masked_fill(~seen, -torch.inf).softmax(-1)
    packed, own = share[..., :history], share[..., history:]
    return packed @ value_HTV, own @ raw_value_HRD, packed.sum(-1)
