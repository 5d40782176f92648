"""Sequences whose packed vectors are of real codecs, for the kernels of a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillhouse.kernels.paged_attention import PageFormat, read_vectors, write_vectors
from stillhouse.kernels.paged_attention.gpu import CodedBasis, GpuCodec, Sequences
from stillhouse.kernels.paged_attention.reference import coded_vectors
from stillhouse.kernels.turboquant import (
    ChannelGroup,
    FittedCodec,
    Fp8Codec,
    MseCodec,
)
from tests.kernels.paged_attention.fits import fitted_codec


def codec_of(bits: int, dim: int) -> GpuCodec:
    """8 is fp8."""
    return Fp8Codec(dim) if bits == 8 else MseCodec(dim, bits, "least_squares", seed=bits)


def fitted(bits: int, coded: int, dim: int, heads: int, seed: int = 1) -> FittedCodec:
    """With a mean and a map of each head's own; dim - coded channels are left out."""
    groups = [ChannelGroup(coded, bits), ChannelGroup(dim - coded, 0)]
    return fitted_codec([group for group in groups if group.channels], heads, seed)


@dataclass(frozen=True)
class Paged:
    """Pages in shuffled order. coded: keys and values of each sequence, as the reference wants."""

    bases: tuple[CodedBasis, CodedBasis]
    format: PageFormat
    keys: Tensor
    values: Tensor
    sequences: Sequences
    coded: list[tuple[Tensor, Tensor]]

    def to(self, device: str) -> "tuple[Tensor, Tensor, Sequences]":
        """What a launch takes."""
        ends = Sequences(*(part.to(device) for part in self.sequences))
        return self.keys.to(device), self.values.to(device), ends


def paged(
    codecs: tuple[GpuCodec, GpuCodec],
    ranges: Sequence[tuple[int, int]],
    heads: int,
    page: int,
    device: str = "cpu",
    seed: int = 0,
    sizes: Tensor | None = None,
) -> Paged:
    """Keys and values of Gaussian vectors; the rest of the pages is NaN.

    sizes: of tokens, in turn; all 1 by default.
    """
    draw = torch.Generator().manual_seed(seed)
    bases = (CodedBasis.of(codecs[0], device), CodedBasis.of(codecs[1], device))
    format = PageFormat.of(bases[0].format, bases[1].format, page)
    counts = [-(-last // page) for _, last in ranges]
    order = torch.randperm(sum(counts) + 1, generator=draw).int()
    keys, values = (half.empty(len(order), heads) for half in (format.key, format.value))
    for pages in (keys, values):
        pages.fill_(255)  # NaN in fp8 and in scalars
    table = torch.zeros((len(ranges), max([*counts, 1])), dtype=torch.int32)
    coded, at = [], 0
    for row, ((first, last), count) in enumerate(zip(ranges, counts, strict=True)):
        table[row, :count] = order[at : at + count]
        at += count
        token = torch.arange(last)
        slots = table[row, token // page].long() * page + token % page
        parts = []
        for pages, half, codec in (
            (keys, format.key, codecs[0]),
            (values, format.value, codecs[1]),
        ):
            x = torch.randn((heads, last, codec.head_dim), generator=draw)[:, first:]
            if isinstance(codec, FittedCodec):
                x = x + codec.fit.mean_HD[:, None].cpu()
            if sizes is not None:
                x = x * sizes[token[first:] % len(sizes), None]
            record: Any = codec.encode(x)
            packed = record.codes if isinstance(codec, Fp8Codec) else record.indices
            scalars = None if isinstance(codec, Fp8Codec) else record.scalars
            write_vectors(pages, half, slots[first:], packed, scalars)
            seen = read_vectors(pages, half, slots[first:])
            parts.append(coded_vectors(*seen, half.format))
        coded.append((parts[0], parts[1]))
    ends = torch.tensor(ranges, dtype=torch.int32)
    sequences = Sequences(table, ends[:, 0].contiguous(), ends[:, 1].contiguous())
    return Paged(bases, format, keys, values, sequences, coded)
