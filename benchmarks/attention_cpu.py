"""Decode attention on a CPU: straight from packed pages, and torch over 16 and 32-bit tensors.

    python -m benchmarks.attention_cpu --json OUT [--quick] [--threads N] [--contexts N …]

One query token a sequence, or (`chunk …`) 128 tokens that continue it, causal; shapes are those of
SmolLM2-135M and of Llama-3.1-8B. Peers in the same run: `scaled_dot_product_attention` on bfloat16
and on float32 keys and values, with grouped heads.
A row: the best of several calls over caches that take turns, so that none stays in a processor's
cache; bytes of the cache; bytes a second; two bounds measured in the same run (cpu_bound.py): the
time in which these threads read that many bytes, and the time in which they do the instructions
that decoding and multiplying takes at least, in registers alone (of a chunk: multiply-adds); which
of both is the higher, so that it holds, and how often it goes into the time.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.cpu_bound import ENOUGH, Mix, best, least_seconds, read_rate
from stillhouse.kernels.paged_attention import (
    FP8,
    HalfPage,
    PageFormat,
    VectorFormat,
    cpu,
)
from stillhouse.kernels.paged_attention.cpu_chunk import ChunkSpan, ChunkTokens, chunk_decoder
from stillhouse.kernels.paged_attention.cpu_plan import DecodePlan

SHAPES = {"smollm2-135m": (3, 3, 64), "llama-8b": (8, 4, 128)}  # heads, queries of each, head size
CONTEXTS, QUICK = (1024, 4096, 16384, 65536), (1024, 4096)
FORMATS = {"k4v4": (4, 4), "k3v3": (3, 3), "k2v2": (2, 2), "fp8": (FP8, FP8)}
PEERS = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CHUNK = 128  # tokens of a continued prompt


@dataclass(frozen=True)
class Row:
    """One format, shape and context; bytes and seconds."""

    shape: str
    context: int
    format: str
    seconds: float
    cache_bytes: int
    bytes_per_second: float
    read_bound: float
    arithmetic_bound: float | None
    bound: str = "read"
    times_bound: float = 0.0
    ratio_to_bfloat16: float | None = None


def main() -> None:
    """Measure, print and write."""
    asked = arguments()
    if not asked.json.parent.is_dir():
        raise SystemExit(f"--json: expected a folder that exists, found {asked.json.parent}")
    torch.set_num_threads(asked.threads)
    machine = {
        "processor": processor(),
        "threads": asked.threads,
        "read_bytes_per_second": read_rate(),
    }
    print(json.dumps(machine))
    rows: list[Row] = []
    for shape in SHAPES:
        for context in asked.contexts or (QUICK if asked.quick else CONTEXTS):
            rows += measured(shape, context, machine, asked.threads)
            rows += chunks(shape, context, machine, asked.threads)
    packages = ("stillhouse", "torch", "llvmlite")
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    date = datetime.now(UTC).date().isoformat()
    head = {"date": date, "machine": machine, "versions": versions}
    asked.json.write_text(json.dumps({**head, "rows": [asdict(row) for row in rows]}, indent=1))
    print(f"Everything: {asked.json}")


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--contexts", type=int, nargs="+")
    parser.add_argument("--quick", action="store_true", help=f"contexts {QUICK} only")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    return parser.parse_args()


def processor() -> str:
    """Its name."""
    found = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    return found[0].split(":", 1)[1].strip() if found else platform.machine()


def measured(shape: str, context: int, machine: dict[str, Any], threads: int) -> list[Row]:
    """The peers and every format."""
    heads, group, dim = SHAPES[shape]
    rows = []
    for name, kind in PEERS.items():
        size = 2 * heads * context * dim * kind.itemsize
        query = torch.randn(1, heads * group, 1, dim).to(kind)
        calls = [whole_call(query, heads, context, kind) for _ in copies(size)]
        rows.append(row(shape, context, name, best(calls), size, None, machine))
    for name, (key, value) in FORMATS.items():
        pages = PageFormat.of(VectorFormat.uniform(dim, key), VectorFormat.uniform(dim, value), 64)
        size = -(-context // pages.tokens) * heads * pages.nbytes
        query = torch.randn(1, heads, group, dim) / dim**0.5
        plan = step_plan(query, pages, context)
        calls = [packed_call(query, pages, context, plan, threads) for _ in copies(size)]
        bound = None
        if key != FP8:
            values = 2 * context * heads * dim
            bound = least_seconds(values, Mix.of(key, group, dim), threads)
        rows.append(row(shape, context, name, best(calls), size, bound, machine))
    return compared(rows)


def compared(rows: Sequence[Row]) -> list[Row]:
    """With their ratios to the first, the bfloat16 peer; printed."""
    peer = rows[0].seconds
    found = [Row(**(asdict(one) | {"ratio_to_bfloat16": one.seconds / peer})) for one in rows]
    for one in found:
        print(line(one), flush=True)
    return found


def chunks(shape: str, context: int, machine: dict[str, Any], threads: int) -> list[Row]:
    """A chunk after so much context: the peers with a mask, and 4 bits; multiply-adds bound it."""
    heads, group, dim = SHAPES[shape]
    whole = context + CHUNK
    products = CHUNK * group * heads * (context + CHUNK / 2) * 2 * dim
    bound = least_seconds(products, Mix(1, 0, 0), threads)
    mask = torch.ones(CHUNK, whole, dtype=torch.bool).tril(context)
    rows = []
    for name, kind in PEERS.items():
        query = torch.randn(1, heads * group, CHUNK, dim).to(kind)
        calls = [whole_call(query, heads, whole, kind, mask)]
        size = 2 * heads * whole * dim * kind.itemsize
        # bfloat16 has units of its own on some processors: no bound of ours.
        mine = bound if kind == torch.float32 else None
        rows.append(row(shape, context, f"chunk {name}", best(calls), size, mine, machine))
    vectors = VectorFormat.uniform(dim, 4)
    pages = PageFormat.of(vectors, vectors, 64)
    size = -(-context // pages.tokens) * heads * pages.nbytes
    call = chunk_call(heads, group, pages, context, threads)
    rows.append(row(shape, context, "chunk k4v4", best([call]), size, bound, machine))
    return compared(rows)


def chunk_call(
    heads: int, group: int, pages: PageFormat, context: int, threads: int
) -> Callable[[], Any]:
    """Ours, its pages in no order."""
    dim, count = pages.key.format.channels, -(-context // pages.tokens)
    query = torch.randn(1, heads, CHUNK * group, dim) / dim**0.5
    raw = torch.randn(2, 1, heads, CHUNK, dim)
    keys, values = (
        cpu.PackedHalf(random_half(count, heads, half)) for half in (pages.key, pages.value)
    )
    table = torch.randperm(count).int()[None]
    attend, spans = chunk_decoder(pages, group).attend, [ChunkSpan(0, context, context)]
    tokens = ChunkTokens(query, raw[0], raw[1])
    return lambda: attend(query, keys, values, spans, tokens, table_BW=table, threads=threads)


def whole_call(
    query: Tensor, heads: int, context: int, kind: torch.dtype, mask: Tensor | None = None
) -> Callable[[], Any]:
    """torch over a cache of its own."""
    shape = (1, heads, context, query.shape[-1])
    keys, values = torch.randn(shape).to(kind), torch.randn(shape).to(kind)
    attend = scaled_dot_product_attention
    return lambda: attend(query, keys, values, attn_mask=mask, enable_gqa=True)


def step_plan(query: Tensor, pages: PageFormat, context: int) -> DecodePlan:
    """Made once a step and shared by its layers, the caches here; pages in no order."""
    _, heads, group, _ = query.shape
    table = torch.randperm(-(-context // pages.tokens)).int()[None]
    return DecodePlan([(0, context)], [(0, 0, 0, 0)], heads, group, pages.tokens, table)


def packed_call(
    query: Tensor, pages: PageFormat, context: int, plan: DecodePlan, threads: int
) -> Callable[[], Any]:
    """Ours over a cache of its own."""
    count, (_, heads, group, dim) = -(-context // pages.tokens), query.shape
    keys, values = random_half(count, heads, pages.key), random_half(count, heads, pages.value)
    attend = cpu.decoder(pages, group).attend
    halves = cpu.PackedHalf(keys), cpu.PackedHalf(values)
    none = torch.empty((1, heads, 0, dim), dtype=torch.bfloat16)
    raw = cpu.RawTokens(query, ((none, none), (none, none)))
    return lambda: attend(query, *halves, plan, raw, threads=threads)


def copies(size: int) -> range:
    """As many caches as a processor's cache does not hold."""
    return range(max(1, min(64, ENOUGH // size)))


def random_half(count: int, heads: int, half: HalfPage) -> Tensor:
    """Any bytes, with scalars of 1."""
    made = torch.randint(0, 256, (count, heads, half.nbytes), dtype=torch.uint8)
    if half.format.is_fp8:
        return made & 0x3F  # numbers below 2
    made[..., half.scalars :] = torch.ones(half.tokens).half().view(torch.uint8)
    return made


def row(
    shape: str,
    context: int,
    name: str,
    seconds: float,
    size: int,
    bound: float | None,
    machine: dict[str, Any],
) -> Row:
    """With its bounds."""
    read = size / machine["read_bytes_per_second"]
    higher = max(read, bound or 0.0)
    which = "read" if higher == read else "arithmetic"
    rate, times = size / seconds, seconds / higher
    return Row(shape, context, name, seconds, size, rate, read, bound, which, times)


def line(one: Row) -> str:
    """Of the printed table."""
    bound = "" if one.arithmetic_bound is None else f"{1e6 * one.arithmetic_bound:9.0f}"
    return (
        f"{one.shape:>13} {one.context:>6} {one.format:>14} {1e6 * one.seconds:9.0f} us "
        f"{one.ratio_to_bfloat16:6.3f} of bfloat16 {one.cache_bytes / 1e6:8.2f} MB "
        f"{one.bytes_per_second / 1e9:6.2f} GB/s  bounds: read {1e6 * one.read_bound:9.0f} us, "
        f"arithmetic {bound} us; {one.times_bound:5.2f} x {one.bound}"
    )


if __name__ == "__main__":
    main()
