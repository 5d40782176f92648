"""Continued prefill on a GPU: a chunk of queries over packed history and its own raw tokens.

History is decoded tile by tile into registers (`triton_chunk`); there is no de-quantised workspace.
Chunks of several lengths are padded at their ends: a query sees no token after its own.

Shape suffixes: B sequences, H key/value heads, G queries of each, T tokens of the chunk, M rows,
row t·G + g of token t; R raw tokens, D head size.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from stillhouse.kernels.paged_attention.gpu import (
    ASM,
    GpuDecoder,
    Sequences,
    floats,
    head_stride,
)
from stillhouse.kernels.paged_attention.gpu_configs import chunk_options, finish_options
from stillhouse.kernels.paged_attention.gpu_refusals import (
    require_chunk,
    require_places,
    require_table,
)
from stillhouse.kernels.paged_attention.refusals import require_least
from stillhouse.kernels.paged_attention.triton_chunk import chunk_kernel, finish_kernel


class ChunkTokens(NamedTuple):
    """Keys and values of the chunk, in the queries' dtype, each head's tokens contiguous.

    key_BHRD, value_BHRD: the last T of the R tokens are the chunk's; those before are tokens in 16
    bits between history and chunk. position_B: int32, the place of the chunk's first token among
    history's, at or past its end. hidden_B: int32, raw tokens, from the first, that no query sees.
    """

    key_BHRD: Tensor
    value_BHRD: Tensor
    position_B: Tensor
    hidden_B: Tensor


def attend_chunk(
    decoder: GpuDecoder,
    query_BHMD: Tensor,
    keys_NHY: Tensor,
    values_NHY: Tensor,
    sequences: Sequences,
    chunk: ChunkTokens,
    *,
    group: int,
    window: int = 0,
    trusted: bool = False,
) -> tuple[Tensor, Tensor]:
    """The softmax over history and raw tokens, of each query up to its own token.

    query_BHMD: rows of `group` queries a token, as `rows_of_chunk` makes them. window:
    how many tokens a query sees, itself included; 0 for all. All else as `GpuDecoder.attend`.

    Returns [B, H, M, D] in the queries' dtype and the logarithms of sums of exponentials, float32
    [B, H, M]. ValueError, before anything is launched, for what does not fit.
    """
    require_chunk(decoder, query_BHMD, (keys_NHY, values_NHY), sequences, chunk, group)
    require_least("a window", window, 0)
    if not trusted:
        require_table(decoder.pages.tokens, (keys_NHY, values_NHY), sequences, None)
        require_places(sequences, chunk, query_BHMD.shape[2] // group)
    batch, heads, rows, dim = query_BHMD.shape
    shape = replace(decoder.shape(query_BHMD, raw=False), group=group)
    with torch.cuda.device_of(query_BHMD):
        coded = decoder.coded(query_BHMD)
        sums = floats(query_BHMD, batch, heads, rows, shape.value_channels)
        raw_sums = floats(query_BHMD, batch, heads, rows, dim)
        ml = floats(query_BHMD, batch, heads, 2, 2, rows)
        options = chunk_options(shape, windowed=bool(window), check=decoder.check, asm=ASM)
        strides = [n for half in (keys_NHY, values_NHY) for n in half.stride()[:2]]
        raw_strides = [n for half in chunk[:2] for n in half.stride()[:2]]
        chunk_kernel[(triton.cdiv(rows, options["M"]), heads, batch)](
            query_BHMD, *coded, keys_NHY, values_NHY, decoder.columns(query_BHMD.device),
            *sequences, chunk.position_B, chunk.hidden_B, *chunk[:2], sums, raw_sums, ml,
            decoder.scale, decoder.cap, *query_BHMD.stride()[:2], *strides,
            sequences.table_BW.stride(0), *raw_strides,
            min(keys_NHY.shape[0], values_NHY.shape[0]),
            sequences.table_BW.shape[1] * decoder.pages.tokens,
            rows, chunk.key_BHRD.shape[2], window, **options,
        )  # fmt: skip
        return _finish(decoder, query_BHMD, (sums, raw_sums, ml))


def _finish(
    decoder: GpuDecoder, query: Tensor, sums: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    batch, heads, rows, dim = query.shape
    basis = decoder.value
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = floats(query, batch, heads, rows)
    options: dict[str, Any] = finish_options(
        dim,
        basis.format.channels,
        rows,
        mapped=basis.back_HCD is not None,
        mean=basis.mean_HD is not None,
    )
    finish_kernel[(triton.cdiv(rows, options["M"]), heads, batch)](
        *sums, basis.back_HCD, basis.mean_HD, out, lse,
        head_stride(basis.back_HCD), head_stride(basis.mean_HD), rows, **options,
    )  # fmt: skip
    return out, lse
