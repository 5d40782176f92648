"""Before a server starts: the kernels of this machine against float64, on pages of its shapes.

Shape suffixes: T tokens, Q query heads, H key/value heads, D head size.
"""

import torch
from torch import Tensor

from stillhouse.errors import ModelError
from stillhouse.kernels.turboquant import to_half
from stillhouse.workers.serving.layout import Blocks
from stillhouse.workers.serving.packed_layer import PackedLayer, stored_vectors
from stillhouse.workers.serving.step import Step

# A wrong page, scale or mask costs 1e-2 and more.
WITHIN = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 8e-3}


def require_right(
    layer: PackedLayer,
    heads: int,
    name: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> float:
    """The worst relative error of a layer's attention to states of a dtype; ModelError where it is
    above `WITHIN`."""
    error, allowed = worst_error(layer, heads, dtype=dtype, device=device), WITHIN[dtype]
    if not error <= allowed:
        raise ModelError(
            f"self-check: expected attention of {name} over packed pages within {allowed:g} of "
            f"float64, found {error:.2g}; report it with the output of `stillhouse doctor`"
        )
    return error


def worst_error(
    layer: PackedLayer,
    heads: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> float:
    """Of a prompt in two chunks and of generated tokens of two sequences, on random pages."""
    draw = torch.Generator().manual_seed(seed)
    block, dim = layer.layout.pages.tokens, layer.layout.head_dim
    lengths = (block + block // 2, 3)
    table = torch.tensor([[3, 1], [2, 0]], dtype=torch.int32, device=device)
    size = layer.layout.token_bytes
    memory = torch.zeros((4, heads, block, size), dtype=torch.uint8, device=device)
    blocks = layer.layout.views(memory, to_half(torch.empty(0, dtype=dtype)).dtype)
    found, wanted = [], []
    # Each row: tokens of both sequences before and after a step.
    for before, after in (((0, 0), (block - 5, 2)), ((block - 5, 2), lengths)):
        counts = [end - first for first, end in zip(before, after, strict=True)]
        step = Step([0, counts[0], sum(counts)], list(after), table, block)
        many = (heads, heads, heads * layer.group)
        key, value, query = (
            torch.randn((sum(counts), n, dim), generator=draw, dtype=torch.float32).to(
                device, dtype
            )
            for n in many
        )
        slots = [int(table[r, t // block]) * block + t % block
                 for r in (0, 1) for t in range(before[r], after[r])]  # fmt: skip
        layer.store((key, value), blocks, torch.tensor(slots, device=device), step)
        out = torch.empty_like(query)
        layer.attend(query, blocks, step, out)
        for r in (0, 1):
            rows = slice(step.starts[r], step.starts[r + 1])
            found.append(out[rows])
            wanted.append(_reference(layer, blocks, table[r], query[rows], (before[r], after[r])))
    exact = torch.cat(wanted)
    error = (torch.cat(found).double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    return float(error.max())


def _reference(
    layer: PackedLayer, blocks: Blocks, table_W: Tensor, query_TQD: Tensor, span: tuple[int, int]
) -> Tensor:
    """Attention of the tokens [first, end) over what is stored of all, float64 [T, Q, D]."""
    first, end = span
    stored = [_stored(layer, blocks, table_W, number, end) for number in (0, 1)]
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


def _stored(layer: PackedLayer, blocks: Blocks, table_W: Tensor, number: int, end: int) -> Tensor:
    block = layer.layout.pages.tokens
    place = torch.arange(end, device=table_W.device)
    slots = table_W.long()[place // block] * block + place % block
    half = (layer.layout.pages.key, layer.layout.pages.value)[number]
    found = stored_vectors(layer.codecs[number], blocks[number], half, slots).double()
    sinks = min(layer.layout.sinks, end)
    found[:, :sinks] = blocks.sinks_NH2SD[int(table_W[0]), :, number, :sinks].double()
    return found
