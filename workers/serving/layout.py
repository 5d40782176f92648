"""A layer's cache in the blocks that a serving engine hands out: packed keys and values, and sinks.

A block of one head is a half page of keys, one of values, then room for the sinks: the first tokens
of a sequence, which stay in 16 bits. Only a sequence's first block uses that room, but there it is
what the engine shares, evicts and swaps with the block's other tokens, so that prefix caching and
preemption need to know nothing of sinks.

Shape suffixes: N blocks, T tokens of a block, H key/value heads, C bytes of a token and head, Y
bytes of a half page, S sinks, D head size.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stillhouse.kernels.paged_attention import PageFormat


class Blocks(NamedTuple):
    """Views of a layer's blocks. keys_NHY, values_NHY: uint8. sinks_NH2SD: 16 bits, keys first."""

    keys_NHY: Tensor
    values_NHY: Tensor
    sinks_NH2SD: Tensor


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """pages: one is a block. sinks: S; they take 4·D bytes each."""

    pages: PageFormat
    head_dim: int
    sinks: int = 0

    @property
    def token_bytes(self) -> int:
        """C: all of a block's bytes, shared out over its tokens and rounded up."""
        return -(-(self.pages.nbytes + 4 * self.sinks * self.head_dim) // self.pages.tokens)

    def views(self, blocks_NHTC: Tensor, half: torch.dtype) -> Blocks:
        """Of an engine's uint8 tensor, each head of a block contiguous; half: of the sinks.

        ValueError for a tensor of another shape.
        """
        size, tokens = self.token_bytes, self.pages.tokens
        fits = blocks_NHTC.dtype == torch.uint8 and blocks_NHTC.shape[2:] == (tokens, size)
        if not fits or blocks_NHTC.stride()[2:] != (size, 1):
            raise ValueError(
                f"expected blocks of uint8 [N, H, {tokens}, {size}], each head contiguous, found "
                f"{blocks_NHTC.dtype} {list(blocks_NHTC.shape)} of strides {blocks_NHTC.stride()}"
            )
        bytes_NHY = blocks_NHTC.flatten(2)
        keys, values = self.pages.key.nbytes, self.pages.nbytes
        last = values + 4 * self.sinks * self.head_dim
        sinks = bytes_NHY[..., values:last].view(half)
        return Blocks(
            bytes_NHY[..., :keys],
            bytes_NHY[..., keys:values],
            sinks.unflatten(-1, (2, self.sinks, self.head_dim)),
        )
