"""Before a server starts: the kernels of this machine against PyTorch, on pages of its shapes.

What is stored is compared with what PyTorch's codec makes of the same states, and attention with
float64 over what PyTorch reads back from the pages.

Shape suffixes: T tokens, Q query heads, H key/value heads, D head size.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from stillhouse.errors import ModelError
from stillhouse.kernels.paged_attention import HalfPage, read_vectors
from stillhouse.kernels.turboquant import Fp8Codec, PackedVectors, to_half
from stillhouse.workers.serving.layout import Blocks
from stillhouse.workers.serving.packed_layer import PackedLayer, stored_vectors
from stillhouse.workers.serving.step import Step, slots_of

# A wrong page, scale or mask costs 1e-2 and more.
WITHIN = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 8e-3}
STORED_WITHIN = 0.02  # of vectors: rounding takes some codes at a boundary to its other side
_SAME = 1e-2  # relative error of a vector with the same codes; another code costs more
_LONG = 4  # blocks and a half of the longer sequence: more than one split of a kernel


def require_right(
    layer: PackedLayer,
    heads: int,
    name: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> float:
    """The worst relative error of a layer's attention to states of a dtype.

    ModelError where it is above `WITHIN`, or more than `STORED_WITHIN` of the vectors are stored
    wrongly.
    """
    check = Check.of(layer, heads, dtype, torch.device(device))
    error, allowed = check.worst_error(), WITHIN[dtype]
    if not error <= allowed:
        raise ModelError(
            f"self-check: expected attention of {name} over packed pages within {allowed:g} of "
            f"float64, found {error:.2g}; report it with the output of `stillhouse doctor`"
        )
    wrong = check.stored_wrongly()
    if not wrong <= STORED_WITHIN:
        raise ModelError(
            f"self-check: expected keys and values of {name} stored as PyTorch's codec does, found "
            f"{wrong:.1%} of vectors that are not; report it with the output of `stillhouse doctor`"
        )
    return error


def worst_error(
    layer: PackedLayer,
    heads: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> float:
    """Of `Check.worst_error`; infinite where too many vectors are stored wrongly."""
    check = Check.of(layer, heads, dtype, torch.device(device))
    error = check.worst_error()
    return error if check.stored_wrongly() <= STORED_WITHIN else math.inf


@dataclass(frozen=True)
class Check:
    """Two sequences of random states, the first longer than some blocks, the other than the sinks.

    table_RW: their blocks among `blocks`. states: queries, keys and values [T, …, D] of each.
    """

    layer: PackedLayer
    blocks: Blocks
    table_RW: Tensor
    states: tuple[tuple[Tensor, Tensor, Tensor], ...]

    @classmethod
    def of(
        cls,
        layer: PackedLayer,
        heads: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "Check":
        """With a window, if the layer has one, that hides tokens of the longer sequence."""
        layout, block = layer.layout, layer.layout.pages.tokens
        if layer.window > block:
            layer = replace(layer, window=block + 3)
        draw = torch.Generator().manual_seed(0)
        lengths = (_LONG * block + block // 2 + 2, layout.sinks + 5)
        short = -(-lengths[1] // block)
        order = torch.randperm(_LONG + 1 + short, generator=draw).int()
        table_RW = torch.zeros((2, _LONG + 1), dtype=torch.int32)
        table_RW[0], table_RW[1, :short] = order[: _LONG + 1], order[_LONG + 1 :]
        shape = (len(order), heads, block, layout.token_bytes)
        memory = torch.zeros(shape, dtype=torch.uint8, device=device)
        blocks = layout.views(memory, to_half(torch.empty(0, dtype=dtype)).dtype)
        counts = (heads * layer.group, heads, heads)

        def drawn(tokens: int, many: int) -> Tensor:
            shape = (tokens, many, layout.head_dim)
            return torch.randn(shape, generator=draw, dtype=torch.float32).to(device, dtype)

        states = [[drawn(tokens, many) for many in counts] for tokens in lengths]
        found = tuple((query, key, value) for query, key, value in states)
        return cls(layer, blocks, table_RW.to(device), found)

    def worst_error(self) -> float:
        """Relative, of a prompt in two chunks each and then two generated tokens."""
        one, two = (query.shape[0] for query, *_ in self.states)
        block = self.layer.layout.pages.tokens
        ends = [(0, 0), (block - 5, 2), (one - 2, two - 2), (one - 1, two - 1), (one, two)]
        errors = [self._step_error(*pair) for pair in pairwise(ends)]
        return float(torch.cat(errors).max())

    def stored_wrongly(self) -> float:
        """The share of vectors, sinks aside, that are not what PyTorch's codec stores of them;
        after `worst_error`."""
        wrong = []
        for r, (_, *pair) in enumerate(self.states):
            sinks = min(self.layer.layout.sinks, pair[0].shape[0])
            for number, (codec, x_THD) in enumerate(zip(self.layer.codecs, pair, strict=True)):
                found = self._stored(number, r, x_THD.shape[0])
                wanted = _as_stored(codec, x_THD).double()
                wanted[:, :sinks] = to_half(x_THD[:sinks]).double().transpose(0, 1)
                error_HT = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
                if bool((error_HT[:, :sinks] > 0).any()):  # they are few, but copied
                    return 1.0
                wrong.append((error_HT > _SAME).flatten())
        return float(torch.cat(wrong).double().mean())

    def _step_error(self, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
        counts = [end - first for first, end in zip(before, after, strict=True)]
        block = self.layer.layout.pages.tokens
        step = Step([0, counts[0], sum(counts)], list(after), self.table_RW, block)
        spans = list(zip(before, after, strict=True))
        query, key, value = (
            torch.cat([self.states[r][part][slice(*spans[r])] for r in (0, 1)]) for part in range(3)
        )
        slots = torch.cat([self._slots(r, *spans[r]) for r in (0, 1)])
        self.layer.store((key, value), self.blocks, slots, step)
        out = torch.empty_like(query)
        self.layer.attend(query, self.blocks, step, out)
        exact = torch.cat([self._reference(r, *spans[r]) for r in (0, 1)])
        error: Tensor = (out.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
        return error

    def _slots(self, r: int, first: int, end: int) -> Tensor:
        return slots_of(self.table_RW[r], first, end, self.layer.layout.pages.tokens)

    def _reference(self, r: int, first: int, end: int) -> Tensor:
        """Attention of the tokens [first, end) over what is stored of all, float64 [T, Q, D]."""
        layer, query_TQD = self.layer, self.states[r][0][first:end]
        stored = [self._stored(number, r, end) for number in (0, 1)]
        keys, values = (x_HTD.repeat_interleave(layer.group, dim=0) for x_HTD in stored)
        score = query_TQD.double().transpose(0, 1) @ keys.mT * layer.scaling
        if layer.softcap:
            score = layer.softcap * torch.tanh(score / layer.softcap)
        place = torch.arange(end, device=query_TQD.device)
        own = place[first:, None]
        hidden = place > own
        if layer.window:
            hidden |= place <= own - layer.window
        out_QTD: Tensor = score.masked_fill(hidden, -torch.inf).softmax(-1) @ values
        return out_QTD.transpose(0, 1)

    def _stored(self, number: int, r: int, end: int) -> Tensor:
        """Keys (0) or values (1) as PyTorch reads them back, float64 [H, T, D]."""
        layer, slots = self.layer, self._slots(r, 0, end)
        half: HalfPage = (layer.layout.pages.key, layer.layout.pages.value)[number]
        codec = layer.codecs[number]
        packed_HTP, scalars_HT = read_vectors(self.blocks[number], half, slots)
        if scalars_HT is None:
            found: Tensor = stored_vectors(codec, self.blocks[number], half, slots).double()
        else:
            record = PackedVectors(packed_HTP[None], scalars_HT[None])
            found = codec.decode_reference(record)[0].double()
        sinks = min(layer.layout.sinks, end)
        first = int(self.table_RW[r, 0])
        found[:, :sinks] = self.blocks.sinks_NH2SD[first, :, number, :sinks].double()
        return found


def _as_stored(codec: Any, x_THD: Tensor) -> Tensor:
    """What PyTorch's codec makes of states, float32 [H, T, D]."""
    x_HTD = x_THD.transpose(0, 1)[None]
    record = codec.encode_reference(x_HTD)
    decode = codec.decode if isinstance(codec, Fp8Codec) else codec.decode_reference
    found: Tensor = decode(record)[0]
    return found
