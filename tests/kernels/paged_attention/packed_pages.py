"""Random pages, filled through the writer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.kernels.paged_attention import PageFormat, VectorFormat, write_vectors
from stillhouse.kernels.paged_attention.cpu import RawTokens
from stillhouse.kernels.turboquant import ChannelGroup

MIXED_KEY = VectorFormat((ChannelGroup(16, 5), ChannelGroup(32, 3), ChannelGroup(8, 1)))
MIXED_VALUE = VectorFormat((ChannelGroup(24, 4), ChannelGroup(40, 2)))


@dataclass(frozen=True)
class Filled:
    """Pages of sequences of these lengths, in shuffled order."""

    keys: Tensor
    values: Tensor
    table: Tensor
    query: Tensor


def vectors(
    format: VectorFormat, heads: int, tokens: int, draw: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """Packed bytes of any indices, and scalars between 1/2 and 3/2 of a unit vector's."""
    if format.is_fp8:
        numbers = torch.randn((heads, tokens, format.channels), generator=draw)
        return numbers.to(torch.float8_e4m3fn).view(torch.uint8), None
    shape = (heads, tokens, format.packed)
    packed = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
    scalars = torch.rand((heads, tokens), generator=draw) + 0.5
    return packed, (scalars * format.channels**0.5).half()


def no_raw_tokens(batch: int, heads: int, group: int, dim: int = 16) -> RawTokens:
    """Beside packed tokens none in 16 bits."""
    none = torch.zeros((batch, heads, 0, dim), dtype=torch.float16)
    return RawTokens(
        torch.zeros((batch, heads, group, dim), dtype=torch.float32), ((none, none), (none, none))
    )


def filled(format: PageFormat, lengths: list[int], heads: int, group: int, seed: int = 0) -> Filled:
    """Queries make scores of a few units."""
    draw = torch.Generator().manual_seed(seed)
    counts = [-(-length // format.tokens) for length in lengths]
    order = torch.randperm(sum(counts) + 1, generator=draw).int()
    count = sum(counts) + 1
    keys, values = format.key.empty(count, heads), format.value.empty(count, heads)
    table = torch.zeros((len(lengths), max([*counts, 1])), dtype=torch.int32)
    at = 0
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        table[row, :count] = order[at : at + count]
        at += count
        token = torch.arange(length)
        slots = table[row, token // format.tokens].long() * format.tokens + token % format.tokens
        for pages, half in ((keys, format.key), (values, format.value)):
            write_vectors(pages, half, slots, *vectors(half.format, heads, length, draw))
    shape = (len(lengths), heads, group, format.key.format.channels)
    query = torch.randn(shape, generator=draw) * 3 / format.key.format.channels**0.5
    return Filled(keys, values, table, query)
