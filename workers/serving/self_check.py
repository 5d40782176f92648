"""Before a server starts: the kernels of this machine against float64, on pages of its shapes.

Shape suffixes: T tokens, Q query heads, H key/value heads, D head size.
"""

import torch
from torch import Tensor

from stillhouse.errors import ModelError
from stillhouse.workers.serving.cpu_layer import CpuLayer, stored_vectors
from stillhouse.workers.serving.layout import Blocks
from stillhouse.workers.serving.step import Step

WITHIN = 1e-4  # of float32 sums; a wrong page, scale or mask costs 1e-2 and more


def require_right(layer: CpuLayer, heads: int, name: str) -> float:
    """The worst relative error of a layer's attention; ModelError where it is above `WITHIN`."""
    error = worst_error(layer, heads)
    if not error <= WITHIN:
        raise ModelError(
            f"self-check: expected attention of {name} over packed pages within {WITHIN:g} of "
            f"float64, found {error:.2g}; report it with the output of `stillhouse doctor`"
        )
    return error


def worst_error(layer: CpuLayer, heads: int, seed: int = 0) -> float:
    """Of a prompt in two chunks and of generated tokens of two sequences, on random pages."""
    draw = torch.Generator().manual_seed(seed)
    block, dim = layer.layout.pages.tokens, layer.layout.head_dim
    lengths = (block + block // 2, 3)
    table = torch.tensor([[3, 1], [2, 0]], dtype=torch.int32)
    memory = torch.zeros((4, heads, block, layer.layout.token_bytes), dtype=torch.uint8)
    blocks = layer.layout.views(memory, torch.float16)
    found, wanted = [], []
    # Each row: tokens of both sequences before and after a step.
    for before, after in (((0, 0), (block - 5, 2)), ((block - 5, 2), lengths)):
        counts = [end - first for first, end in zip(before, after, strict=True)]
        step = Step([0, counts[0], sum(counts)], list(after), table, block)
        key, value = (_drawn(draw, sum(counts), heads, dim) for _ in range(2))
        query = _drawn(draw, sum(counts), heads * layer.group, dim)
        slots = [int(table[r, t // block]) * block + t % block
                 for r in (0, 1) for t in range(before[r], after[r])]  # fmt: skip
        layer.store((key, value), blocks, torch.tensor(slots), step)
        out = torch.empty_like(query)
        layer.attend(query, blocks, step, out)
        for r in (0, 1):
            rows = slice(step.starts[r], step.starts[r + 1])
            found.append(out[rows])
            wanted.append(_reference(layer, blocks, table[r], query[rows], (before[r], after[r])))
    exact = torch.cat(wanted)
    error = (torch.cat(found).double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    return float(error.max())


def _drawn(draw: torch.Generator, tokens: int, heads: int, dim: int) -> Tensor:
    return torch.randn((tokens, heads, dim), generator=draw, dtype=torch.float32)


def _reference(
    layer: CpuLayer, blocks: Blocks, table_W: Tensor, query_TQD: Tensor, span: tuple[int, int]
) -> Tensor:
    """Attention of the tokens [first, end) over what is stored of all, float64 [T, Q, D]."""
    first, end = span
    stored = [_stored(layer, blocks, table_W, number, end) for number in (0, 1)]
    keys, values = (x_HTD.repeat_interleave(layer.group, dim=0) for x_HTD in stored)
    score = query_TQD.double().transpose(0, 1) @ keys.mT * layer.scaling
    if layer.softcap:
        score = layer.softcap * torch.tanh(score / layer.softcap)
    place = torch.arange(end)
    own = torch.arange(first, end)[:, None]
    hidden = place > own
    if layer.window:
        hidden |= place <= own - layer.window
    out_QTD: Tensor = score.masked_fill(hidden, -torch.inf).softmax(-1) @ values
    return out_QTD.transpose(0, 1)


def _stored(layer: CpuLayer, blocks: Blocks, table_W: Tensor, number: int, end: int) -> Tensor:
    block = layer.layout.pages.tokens
    place = torch.arange(end)
    slots = table_W.long()[place // block] * block + place % block
    half = (layer.layout.pages.key, layer.layout.pages.value)[number]
    found = stored_vectors(layer.codecs[number], blocks[number], half, slots).double()
    sinks = min(layer.layout.sinks, end)
    found[:, :sinks] = blocks.sinks_NH2SD[int(table_W[0]), :, number, :sinks].double()
    return found
