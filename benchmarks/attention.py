"""Decode attention on a GPU: over packed pages, and its peers, in one run.

    python -m benchmarks.attention [--quick] [--json OUT] [--seconds N] [--contexts N …]
        [--batches N …] [--kernels NAME …]

One decode step of one layer: a query token of each sequence, shapes of Llama-3.1-8B and 70B. Peers
are those of attention_peers.py and attention_served.py; what is not installed is said. Each of this
project's kernels is first compared with float64: the launch that is timed, all heads of one of its
sequences, and the same launch over mixed lengths. Where it is wrong it is not timed: the run goes
on and ends with exit status 1. What fails or does not fit is a line with its reason.

A row: the median of replays of a CUDA graph whose steps read caches in turn, together eight times
the L2 cache, so that every byte comes from memory; bytes of one cache; bytes a second, and their
share of what a copy on the device moves in the same run; the peak of allocated memory with all
those caches, and how much of it a step adds; the time over that of each peer, below 1 where it is
shorter. `--seconds` bounds the run: the most telling cases come first.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.attention_cases import DecodeCase, DecodeKernel, cases
from benchmarks.attention_packed import packed_kernels
from benchmarks.attention_peers import (
    KERNEL_ERRORS,
    FlexKernel,
    SdpaKernel,
    reason,
)
from benchmarks.attention_served import (
    PRESETS,
    FlashInferKernel,
    VllmFlashKernel,
    VllmTurboQuantKernel,
)
from benchmarks.gpu_timing import CudaDevice, StepDevice, copies, copy_rate, slug

ROOT = Path(__file__).resolve().parents[1]
SLACK = 1 << 30  # bytes beside the caches
BOUND, QUICK_BOUND = 540, 220  # seconds
PACKAGES = ("stillhouse", "torch", "triton", "vllm", "flashinfer-python")


@dataclass(frozen=True)
class Row:
    """One kernel in one case; bytes and seconds."""

    shape: str
    batch: int
    context: int
    kernel: str
    page: int | None
    seconds: float
    cache_bytes: int
    copies: int
    bytes_per_second: float
    share_of_copy: float
    peak_bytes: int
    step_bytes: int
    ratios: dict[str, float] = field(default_factory=dict)  # to each peer's seconds


@dataclass(frozen=True)
class Skip:
    """What was not timed, and why. failed: it should have been."""

    shape: str
    batch: int
    context: int
    kernel: str
    reason: str
    failed: bool = False


@dataclass
class Table:
    """What a run has found so far."""

    head: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)

    def write(self, file: Path) -> None:
        """JSON."""
        found = {"rows": list(map(asdict, self.rows)), "skipped": list(map(asdict, self.skipped))}
        file.write_text(json.dumps({**self.head, **found}, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write; SystemExit 1 when a kernel of this project was not timed."""
    asked = parsed(arguments)
    device = CudaDevice()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise SystemExit("expected compiled kernels, found TRITON_INTERPRET set: unset it")
    file = asked.json or default_file(device.facts()["device"], quick=asked.quick)
    if not file.parent.is_dir():
        raise SystemExit(f"--json: expected a folder that exists, found {file.parent}")
    torch.manual_seed(0)
    bound = asked.seconds or (QUICK_BOUND if asked.quick else BOUND)
    table = run(device, chosen(asked), kernels(asked.kernels), file, bound, quick=asked.quick)
    print(f"Everything: {file}")
    wrong = {skip.kernel for skip in table.skipped if skip.failed}
    if wrong & {kernel.name for kernel in packed_kernels()}:
        raise SystemExit(1)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="benchmarks/results/attention-<device>.json")
    parser.add_argument("--quick", action="store_true", help="three cases, under 4 minutes")
    parser.add_argument("--seconds", type=float, help=f"bound of the run: {BOUND}, {QUICK_BOUND}")
    parser.add_argument("--contexts", type=int, nargs="+", help="only these")
    parser.add_argument("--batches", type=int, nargs="+", help="only these")
    names = [kernel.name for kernel in kernels()]
    parser.add_argument("--kernels", nargs="+", choices=names, metavar="NAME", help=str(names))
    return parser.parse_args(arguments)


def default_file(device: str, *, quick: bool) -> Path:
    """A quick run does not replace the whole table."""
    name = f"attention-{slug(device)}{'-quick' if quick else ''}.json"
    return ROOT / "benchmarks" / "results" / name


def chosen(asked: argparse.Namespace) -> list[DecodeCase]:
    """Cases that were asked for."""
    return [
        case
        for case in cases(quick=asked.quick)
        if case.context in (asked.contexts or [case.context])
        and case.batch in (asked.batches or [case.batch])
    ]


def kernels(names: Sequence[str] | None = None) -> list[DecodeKernel]:
    """Peers first, so that all ratios of a case are known when it is printed."""
    every: list[DecodeKernel] = [SdpaKernel(), FlexKernel(), VllmFlashKernel(), FlashInferKernel()]
    every += [VllmTurboQuantKernel(f"vllm {preset}", preset=preset) for preset in PRESETS]
    every += packed_kernels()
    return [kernel for kernel in every if names is None or kernel.name in names]


def run(
    device: StepDevice,
    planned: Sequence[DecodeCase],
    kernels: Sequence[DecodeKernel],
    file: Path,
    bound: float,
    *,
    quick: bool = False,
    now: Callable[[], float] = time.monotonic,
) -> Table:
    """Case after case; the file is written after each, so that a crash leaves what there was."""
    until = now() + bound
    rate = copy_rate(device)
    machine = device.facts() | {"copy_bytes_per_second": rate}
    missing = {kernel.name: why for kernel in kernels if (why := absence(kernel)) is not None}
    table = Table(head(machine, missing, quick=quick))
    print(json.dumps(machine))
    for name, why in missing.items():
        print(f"{name}: {why}")
    present = [kernel for kernel in kernels if kernel.name not in missing]
    for case in planned:
        found = [
            measured(case, kernel, device, rate)
            if now() < until
            else skip(case, kernel, f"the run had taken its {bound:.0f} seconds")
            for kernel in present
            if kernel.planned(case)
        ]
        peers = {kernel.name for kernel in present if not kernel.mine}
        rows = with_ratios([one for one in found if isinstance(one, Row)], peers)
        skipped = [one for one in found if isinstance(one, Skip)]
        table.rows += rows
        table.skipped += skipped
        print(*lines(rows, skipped), sep="\n", flush=True)
        table.write(file)
    return table


def absence(kernel: DecodeKernel) -> str | None:
    """Why it is not here. A peer's own test for the device may raise as well."""
    try:
        return kernel.missing()
    except KERNEL_ERRORS as error:
        return reason(error)


def head(machine: dict[str, Any], missing: dict[str, str], *, quick: bool) -> dict[str, Any]:
    """Date, machine, versions, and the peers that are not here."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue  # `missing` says so
    date = datetime.now(UTC).date().isoformat()
    return {
        "date": date,
        "machine": machine,
        "versions": versions | {"torch": torch.__version__},
        "quick": quick,
        "missing": missing,
    }


def measured(case: DecodeCase, kernel: DecodeKernel, device: StepDevice, rate: float) -> Row | Skip:
    """One row; whatever a kernel raises is a reason, and the run goes on."""
    try:
        device.clear()
        size = kernel.cache_bytes(case)
        count = copies(size, device.l2_bytes)
        needed, free = count * size + SLACK, device.free_bytes()
        if needed > free:
            return skip(
                case, kernel, f"expected {needed / 2**30:.1f} GiB free, found {free / 2**30:.1f}"
            )
        return timed(case, kernel, device, rate, count)
    except torch.OutOfMemoryError as error:
        return skip(case, kernel, reason(error))
    except KERNEL_ERRORS as error:
        return skip(case, kernel, reason(error), failed=True)


def timed(
    case: DecodeCase, kernel: DecodeKernel, device: StepDevice, rate: float, count: int
) -> Row | Skip:
    """Checked, then timed."""
    steps = kernel.steps(case, count, device.place)
    wrong = steps.check()
    if wrong is not None:
        return skip(case, kernel, wrong, failed=True)
    before = device.watch_memory()
    seconds = device.step_seconds(steps.calls)
    peak, size = device.peak_bytes(), kernel.cache_bytes(case)
    speed = size / seconds
    return Row(
        *case.key, kernel.name, kernel.page, seconds, size, count, speed, speed / rate, peak,
        peak - before,
    )  # fmt: skip


def skip(case: DecodeCase, kernel: DecodeKernel, why: str, *, failed: bool = False) -> Skip:
    """Of a kernel in a case."""
    return Skip(*case.key, kernel.name, why, failed)


def with_ratios(rows: Sequence[Row], peers: set[str]) -> list[Row]:
    """Rows of one case, each beside every peer but itself."""
    seconds = {row.kernel: row.seconds for row in rows if row.kernel in peers}
    return [
        replace(
            row, ratios={k: row.seconds / peer for k, peer in seconds.items() if k != row.kernel}
        )
        for row in rows
    ]


def lines(rows: Sequence[Row], skipped: Sequence[Skip]) -> Iterator[str]:
    """Of the printed table."""
    for row in rows:
        ratios = "".join(f"  {ratio:.3f} of {name}" for name, ratio in row.ratios.items())
        yield (
            f"{_place(row)} {1e6 * row.seconds:10.1f} us {row.bytes_per_second / 1e9:8.1f} GB/s "
            f"{100 * row.share_of_copy:5.1f} % of a copy "
            f"{row.peak_bytes / 1e6:9.1f} MB peak{ratios}"
        )
    for one in skipped:
        yield f"{_place(one)} {'FAILED' if one.failed else 'left out'}: {one.reason}"


def _place(one: Row | Skip) -> str:
    return f"{one.shape:>9} {one.batch:>3} x {one.context:>6} {one.kernel:>26}"


if __name__ == "__main__":
    main()
