"""Decode attention over packed pages on a CPU: nothing is decoded but into registers.

Compiled by LLVM for the processor it runs on, once a page format, group size and process (a tenth
of a second to a second), and run by threads over sequences, heads and splits of long contexts.

Shape suffixes: B sequences, H key/value heads, G queries of each, N pages, Y bytes of a page, S
splits, C coded channels of a key, V padded channels of a value.
"""

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import torch
from torch import Tensor

from stillhouse.kernels.paged_attention.cpu_ir import NAME, DecodeSpec, emit, value_lanes
from stillhouse.kernels.paged_attention.pages import PageFormat, VectorFormat
from stillhouse.kernels.turboquant import gaussian_codebook

_LN2 = 0.6931471805599453
SPLIT_TOKENS = 2048  # a thread's work is one split: small enough to balance, large enough to pay
_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURE = (
    _POINTER, _LONG, _POINTER, _LONG, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _FLOAT, _POINTER,
    _POINTER,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Compiled:
    """A function's address and what keeps it alive."""

    call: Any
    engine: Any
    text: str


@cache
def _target() -> tuple[Any, str]:
    """This processor, and how a table of 16 floats is read on it."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    found = llvm.get_host_cpu_features()
    permute = "avx512" if found.get("avx512f") else "avx2" if found.get("avx2") else ""
    features = found.flatten() + (",-prefer-256-bit" if permute == "avx512" else "")
    target = llvm.Target.from_default_triple()
    name = llvm.get_host_cpu_name()
    return target.create_target_machine(cpu=name, features=features, opt=3), permute


@cache
def compiled(spec: DecodeSpec) -> Compiled:
    """The function of `cpu_ir.emit`, optimised for this processor."""
    machine, _ = _target()
    module = llvm.parse_assembly(emit(spec))
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    text = machine.emit_assembly(module)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    call = ctypes.CFUNCTYPE(None, *_SIGNATURE)(engine.get_function_address(NAME))
    return Compiled(call, engine, text)


@cache
def _books(pages: PageFormat) -> Tensor:
    """float32 [groups, 32]: centroids of every group of keys, then of values, each repeated."""
    rows = []
    for vectors in (pages.key.format, pages.value.format):
        scale = vectors.channels**-0.5  # decoded vectors are centroids · scalar / √C
        for group in vectors.groups:
            row = torch.zeros(32)
            if not vectors.is_fp8:
                book = torch.tensor(gaussian_codebook(group.bits).centroids, dtype=torch.float64)
                row = (book * scale).float().repeat(32 // book.numel())
            rows.append(row)
    return torch.stack(rows).contiguous()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def attend_packed(
    query_BHGC: Tensor,
    keys_NHY: Tensor,
    values_NHY: Tensor,
    pages: PageFormat,
    table_BW: Tensor,
    ranges: Sequence[tuple[int, int]],
    *,
    softcap: float = 0.0,
    threads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax sums over the packed tokens [first, last) of each sequence.

    query_BHGC: float32, in the keys' coded basis, times the softmax scale. keys_NHY, values_NHY:
    half pages, each contiguous in itself. table_BW: int32, the page of each `pages.tokens` tokens
    of a sequence. softcap: 0 for none. Returns float32 m
    [B, H, G], the greatest score (-1e30 for an empty range), l = Σ exp(s - m), and Σ exp(s - m) ·
    value [B, H, G, V], V the values' coded channels: divide by l, or merge with other tokens' sums
    first. Threads do not change the result's bits.
    """
    batch, heads, group, _ = query_BHGC.shape
    _, permute = _target()
    call = compiled(DecodeSpec(pages, group, bool(softcap), permute)).call
    query = (query_BHGC / _LN2).contiguous()
    width = value_lanes(pages.value.format)[-1]
    splits = [_splits(*span) for span in ranges]
    most = max(map(len, splits), default=0)
    acc = torch.zeros((batch, heads, max(most, 1), group, width))
    ml = torch.empty((batch, heads, max(most, 1), group, 2))
    ml[..., 0], ml[..., 1] = -1e30, 0.0
    books, cap = _books(pages), softcap / _LN2
    halves = [(half.data_ptr(), half.stride(1), half.stride(0)) for half in (keys_NHY, values_NHY)]

    def work(item: tuple[int, int, int, int, int]) -> None:
        b, h, s, first, last = item
        call(
            *(part for start, head, page in halves for part in (start + h * head, page)),
            table_BW.data_ptr() + b * table_BW.stride(0) * 4,
            first,
            last,
            query.data_ptr() + (b * heads + h) * query.stride(1) * 4,
            books.data_ptr(),
            cap,
            acc.data_ptr() + ((b * heads + h) * max(most, 1) + s) * group * width * 4,
            ml.data_ptr() + ((b * heads + h) * max(most, 1) + s) * group * 2 * 4,
        )

    items = [
        (b, h, s, first, last)
        for b, spans in enumerate(splits)
        for h in range(heads)
        for s, (first, last) in enumerate(spans)
    ]
    threads = threads or torch.get_num_threads()
    if threads > 1 and len(items) > 1:
        list(_pool(threads).map(work, items))
    else:
        for item in items:
            work(item)
    return _merged(acc, ml, pages.value.format)


def _splits(first: int, last: int) -> list[tuple[int, int]]:
    """The same for any number of threads."""
    starts = range(first - first % SPLIT_TOKENS, last, SPLIT_TOKENS)
    return [(max(start, first), min(start + SPLIT_TOKENS, last)) for start in starts]


def _merged(acc: Tensor, ml: Tensor, value: VectorFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Over splits; m in exponents of e; without the lanes that pad channel groups."""
    m, total = ml[..., 0], ml[..., 1]
    top = m.amax(2, keepdim=True)
    weight = torch.exp2(m - top)
    total = (total * weight).sum(2)
    out = (acc * weight[..., None]).sum(2)
    starts = value_lanes(value)[:-1]
    pairs = zip(starts, value.groups, strict=True)
    out = torch.cat([out[..., at : at + group.channels] for at, group in pairs], dim=-1)
    top = top.squeeze(2)
    return torch.where(total > 0, top * _LN2, top), total, out
