"""Compiles every shipped Triton kernel for sm_80 and sm_90 and reports what each one takes.

Needs no GPU. Writes `kernels.json` and `kernels.md` into build/kernels, or the folder given, and
exits with 1 when a kernel spills registers, asks for more shared memory than the device has, or
breaks a rule of `hot_loop`, and when docs/kernels-table.md, the last `kernels.md` that was
committed, is of other kernels, or has other figures from the same Triton, which brings its own
compilers.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton

from tools import attention_kernels, codec_kernels
from tools.attention_kernels import AttendConfig, AttentionConfig
from tools.codec_kernels import CodecConfig
from tools.compiled_kernel import Usage, compile_kernel
from tools.hot_loop import LoopCost, loop_cost, loop_faults
from tools.kernel_tables import attend_table, codec_table, other_table, row_names

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "kernels-table.md"


@dataclass(frozen=True, slots=True)
class KernelRecord:
    """A compiled kernel; `loop` is of `attend_kernel` and `chunk_kernel` only."""

    config: CodecConfig | AttentionConfig
    usage: Usage
    loop: LoopCost | None = None

    @property
    def faults(self) -> list[str]:
        """Why it does not ship; empty where it does."""
        found = self.usage.faults(self.config.arch)
        if isinstance(self.config, AttendConfig):
            many = self.config.kernel == "chunk"
            found += loop_faults(self.config.shape, self.loop, many_queries=many)
        return found

    def row(self) -> dict[str, Any]:
        """As it stands in kernels.json."""
        row = {"config": asdict(self.config), **asdict(self.usage)}
        return row if self.loop is None else row | {"loop": asdict(self.loop)}


def measure(config: CodecConfig | AttentionConfig) -> KernelRecord:
    """Compile one configuration and read what it takes from its machine code."""
    usage, cubin = compile_kernel(config.launch(), config.arch)
    if isinstance(config, AttendConfig):
        return KernelRecord(config, usage, loop_cost(cubin, config.values_per_thread))
    return KernelRecord(config, usage)


def markdown(records: list[KernelRecord]) -> str:
    """The tables of all kernels."""
    codec, attend, other = {}, {}, {}
    for record in records:
        match record.config:
            case CodecConfig():
                codec[record.config] = record.usage
            case AttendConfig():
                attend[record.config] = record.usage, record.loop
            case _:
                other[record.config] = record.usage
    parts = (
        "## The codec\n",
        codec_table(codec),
        "## Attention\n\nInstructions of the hot loop for each decoded value.\n",
        attend_table(attend),
        other_table(other),
    )
    return "\n".join(parts)


def document(records: list[KernelRecord]) -> str:
    """What is committed."""
    return (
        "# What each kernel takes\n\n"
        f"Made by `make kernels` (tools/kernel_report.py) with triton {triton.__version__}: "
        f"{len(records)} kernels.\n\n{markdown(records)}"
    )


def staleness(committed: str, made: str) -> str | None:
    """Why the committed table is not what was made; None where it is."""
    old, new = row_names(committed), row_names(made)
    odd = (old - new) + (new - old)
    if odd:
        return f"{odd.total()} rows differ, as that of {' '.join(next(iter(odd)))}"
    compiler = f" triton {triton.__version__}:"
    if compiler in committed and committed != made:
        return "the figures differ, of the same kernels and the same triton"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description="compile the kernels and report what they take")
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "build" / "kernels")
    out: Path = parser.parse_args().out
    # The interpreter replaces what is to be compiled; workers inherit the environment.
    os.environ.pop("TRITON_INTERPRET", None)
    began = time.monotonic()
    # The slowest first, so that no worker is left with them at the end.
    configs = [*attention_kernels.shipped(), *codec_kernels.shipped()]
    workers = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        records = list(pool.map(measure, configs, chunksize=4))
    out.mkdir(parents=True, exist_ok=True)
    rows = [record.row() for record in records]
    (out / "kernels.json").write_text(json.dumps(rows, indent=1) + "\n")
    made = document(records)
    (out / "kernels.md").write_text(made)
    unfit = [record for record in records if record.faults]
    for record in unfit:
        print(f"{'; '.join(record.faults)}: {record.config}", file=sys.stderr)
    stale = staleness(TABLE.read_text() if TABLE.exists() else "", made)
    if stale is not None:
        print(f"{TABLE} is stale: {stale}; copy {out / 'kernels.md'} there", file=sys.stderr)
    most = max(record.usage.registers for record in records)
    shared = max(record.usage.shared for record in records)
    print(
        f"{len(records)} kernels in {time.monotonic() - began:.0f} s: {len(unfit)} do not fit, "
        f"at most {most} registers and {shared} bytes of shared memory; see {out}"
    )
    return 1 if unfit or stale is not None else 0


if __name__ == "__main__":
    sys.exit(main())
