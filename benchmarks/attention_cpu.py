"""Decode attention on a CPU: straight from packed pages, and torch over 16 and 32-bit tensors.

    python benchmarks/attention_cpu.py --json OUT [--quick] [--threads N] [--contexts N …]

One query token a sequence; shapes are those of SmolLM2-135M and of Llama-3.1-8B. Peers in the same
run: `scaled_dot_product_attention` on bfloat16 and on float32 keys and values, with grouped heads.
A row: the best of several calls over caches that take turns, so that none stays in a processor's
cache; bytes of the cache; bytes a second; two bounds measured in the same run: the time in which
these threads read that many bytes, and the time of the multiply-adds and table reads alone (see
`arithmetic_bound`).
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stillhouse.kernels.paged_attention import FP8, HalfPage, PageFormat, VectorFormat, cpu

SHAPES = {"smollm2-135m": (3, 3, 64), "llama-8b": (8, 4, 128)}  # heads, queries of each, head size
CONTEXTS, QUICK = (1024, 4096, 16384, 65536), (1024, 4096)
FORMATS = {"k4v4": (4, 4), "k3v3": (3, 3), "k2v2": (2, 2), "fp8": (FP8, FP8)}
PEERS = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ENOUGH = 256 << 20  # bytes that no cache of a processor holds
SECONDS, CALLS = 0.7, 5


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
        "vector_operations_per_second": operation_rate(),
    }
    print(json.dumps(machine))
    rows: list[Row] = []
    for shape in SHAPES:
        for context in asked.contexts or (QUICK if asked.quick else CONTEXTS):
            rows += measured(shape, context, machine, asked.threads)
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


def best(calls: Sequence[Callable[[], Any]]) -> float:
    """Seconds of the fastest of calls that take turns."""
    for call in calls:
        call()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < CALLS * len(calls) or time.perf_counter() - began < SECONDS:
        at = time.perf_counter()
        calls[len(times) % len(calls)]()
        times.append(time.perf_counter() - at)
    return min(times)


def read_rate() -> float:
    """Bytes a second that the threads read."""
    numbers = torch.ones(ENOUGH // 4)
    return ENOUGH / best([numbers.sum])


def operation_rate() -> float:
    """Vector instructions a second on all threads, from a product of matrices in cache.

    A product of n³ multiply-adds in float32 is n³ / 16 fused instructions, two a cycle at best on
    processors with AVX-512: what the permutations and shifts of decoding share their ports with.
    """
    size = 768
    left, right = torch.randn(size, size), torch.randn(size, size)
    return size**3 / 16 / best([lambda: left @ right])


def arithmetic_bound(bits: int, group: int, dim: int, rate: float) -> float:
    """Seconds a token and head take if only decoding and multiply-adds cost anything.

    For 16 values of a key or of a value: `group` multiply-adds, one permutation that reads the
    table, one shift, and a second shift and a selection where there are two planes; half an
    instruction to bring bytes into lanes.
    """
    each = group + 2.5 + (2 if bits in (3, 5) else 0)
    return 2 * dim / 16 * each / rate


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
        calls = [packed_call(query, pages, context, threads) for _ in copies(size)]
        bound = None
        if key != FP8:
            rate = machine["vector_operations_per_second"]
            bound = context * heads * arithmetic_bound(key, group, dim, rate)
        rows.append(row(shape, context, name, best(calls), size, bound, machine))
    peer = rows[0].seconds
    rows = [Row(**(asdict(one) | {"ratio_to_bfloat16": one.seconds / peer})) for one in rows]
    for one in rows:
        print(line(one), flush=True)
    return rows


def whole_call(query: Tensor, heads: int, context: int, kind: torch.dtype) -> Callable[[], Any]:
    """torch over a cache of its own."""
    shape = (1, heads, context, query.shape[-1])
    keys, values = torch.randn(shape).to(kind), torch.randn(shape).to(kind)
    return lambda: scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def packed_call(query: Tensor, pages: PageFormat, context: int, threads: int) -> Callable[[], Any]:
    """Ours over a cache of its own, its pages in no order."""
    count = -(-context // pages.tokens)
    table = torch.randperm(count).int()[None]
    heads = query.shape[1]
    keys, values = random_half(count, heads, pages.key), random_half(count, heads, pages.value)
    span = [(0, context)]
    attend = cpu.decoder(pages, query.shape[2]).attend
    halves = cpu.PackedHalf(keys), cpu.PackedHalf(values)
    return lambda: attend(query, *halves, span, table, threads=threads)


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
    return Row(shape, context, name, seconds, size, size / seconds, read, bound)


def line(one: Row) -> str:
    """Of the printed table."""
    bound = "" if one.arithmetic_bound is None else f"{1e6 * one.arithmetic_bound:9.0f}"
    return (
        f"{one.shape:>13} {one.context:>6} {one.format:>9} {1e6 * one.seconds:9.0f} us "
        f"{one.ratio_to_bfloat16:6.3f} of bfloat16 {one.cache_bytes / 1e6:8.2f} MB "
        f"{one.bytes_per_second / 1e9:6.2f} GB/s  bounds: read {1e6 * one.read_bound:9.0f} us, "
        f"arithmetic {bound} us"
    )


if __name__ == "__main__":
    main()
