"""Compiles every shipped Triton kernel for sm_80 and sm_90 and reports what each one takes.

Needs no GPU. Writes `kernels.json` and `kernels.md` into build/kernels, or the folder given, and
exits with 1 when a kernel spills registers or asks for more shared memory than the device has.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

BITS = (1, 2, 3, 4, 5)
HEAD_DIMS = (64, 80, 96, 128, 192, 256)
DTYPES = ("fp32", "fp16", "bf16")
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # a block's most, by architecture
# The scalar changes a few instructions a row: all kinds are compiled at the fullest tiles.
USUAL_SCALAR, OTHER_SCALARS = "least_squares", ("norm", "corrected", "unbiased")
FULLEST = {(bits, dim) for bits in (4, 5) for dim in (128, 256)}

_POINTERS = {
    "encode": {
        "x_ptr": "",  # the dtype of the configuration
        "matrix_ptr": "fp32",
        "mean_ptr": "fp32",
        "boundary_ptr": "fp32",
        "centroid_ptr": "fp32",
        "index_ptr": "u8",
        "scalar_ptr": "fp16",
    },
    "decode": {
        "index_ptr": "u8",
        "scalar_ptr": "fp16",
        "matrix_ptr": "fp32",
        "mean_ptr": "fp32",
        "centroid_ptr": "fp32",
        "out_ptr": "",
    },
}


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """One kernel as it ships: a `scalar` is "" for decoding, `dtype` that of the vectors."""

    kernel: str
    arch: int
    bits: int
    head_dim: int
    dtype: str
    scalar: str
    has_mean: bool


@dataclass(frozen=True, slots=True)
class KernelRecord:
    """What the compiled kernel takes: registers a thread, bytes of stack a thread, of shared
    memory a block. Kernels use no stack but for spilled registers."""

    config: KernelConfig
    registers: int
    stack: int
    shared: int
    warps: int

    @property
    def fits(self) -> bool:
        """No spill, and no more shared memory than the architecture has."""
        return self.stack == 0 and self.shared <= SHARED_BYTES[self.config.arch]


def shipped() -> Iterator[KernelConfig]:
    """Every configuration that the launchers use."""
    for arch, bits, dim in itertools.product(SHARED_BYTES, BITS, HEAD_DIMS):
        for dtype in DTYPES:
            yield KernelConfig("encode", arch, bits, dim, dtype, USUAL_SCALAR, True)
            yield KernelConfig("decode", arch, bits, dim, dtype, "", True)
        if (bits, dim) in FULLEST:
            for scalar in OTHER_SCALARS:
                yield KernelConfig("encode", arch, bits, dim, "bf16", scalar, True)
            yield KernelConfig("encode", arch, bits, dim, "bf16", USUAL_SCALAR, False)
            yield KernelConfig("decode", arch, bits, dim, "bf16", "", False)


def measure(config: KernelConfig) -> KernelRecord:
    """Compile one configuration and read what it takes from its machine code."""
    # Imported here: the parent process only counts.
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source, options = _source(config, ASTSource)
    target = GPUTarget("cuda", config.arch, 32)
    compiled = triton.compile(source, target=target, options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    registers, stack = _resource_usage(tool, compiled.asm["cubin"])
    return KernelRecord(config, registers, stack, compiled.metadata.shared, options["num_warps"])


def _source(config: KernelConfig, source: Any) -> tuple[Any, dict[str, Any]]:
    """The ASTSource of a configuration, and the compiler's options."""
    from stillhouse.kernels.turboquant import triton_kernels

    if config.kernel == "encode":
        function = triton_kernels.encode_kernel
        given = triton_kernels.encode_options(
            config.head_dim, config.bits, config.scalar, config.has_mean
        )
    else:
        function = triton_kernels.decode_kernel
        given = triton_kernels.decode_options(config.head_dim, config.bits, config.has_mean)
    names = function.arg_names
    constants = {name: value for name, value in given.items() if name in names}
    options = {name: value for name, value in given.items() if name not in names}
    if not config.has_mean:
        constants["mean_ptr"] = None
    pointers = _POINTERS[config.kernel]
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = "*" + (pointers[name] or config.dtype) if name in pointers else "i32"
    # As at a launch: tensors start at, and strides are, multiples of 16; T is never specialised.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name] != "constexpr" and name != "T"
    }
    return source(function, signature, constants, aligned), options


def _resource_usage(tool: Path, cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack (with local memory) of the one kernel of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    if found is None:
        raise ValueError(f"expected REG, STACK and LOCAL from cuobjdump, found {text!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def markdown(records: list[KernelRecord]) -> str:
    """A table with the largest figures over dtypes and scalars of each kernel."""
    lines = [
        "| kernel | arch | bits | D | warps | registers | spilled bytes | shared bytes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, int, int, int], list[KernelRecord]] = {}
    for record in records:
        c = record.config
        groups.setdefault((c.kernel, c.arch, c.head_dim, c.bits), []).append(record)
    for (kernel, arch, dim, bits), group in sorted(groups.items()):
        registers, stack, shared = (
            max(getattr(record, name) for record in group)
            for name in ("registers", "stack", "shared")
        )
        row = (kernel, f"sm_{arch}", bits, dim, group[0].warps, registers, stack, shared)
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="compile the kernels and report what they take")
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "build" / "kernels")
    out: Path = parser.parse_args().out
    # The interpreter replaces what is to be compiled; workers inherit the environment.
    os.environ.pop("TRITON_INTERPRET", None)
    began, configs = time.monotonic(), list(shipped())
    workers = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        records = list(pool.map(measure, configs, chunksize=4))
    out.mkdir(parents=True, exist_ok=True)
    rows = [asdict(record) for record in records]
    (out / "kernels.json").write_text(json.dumps(rows, indent=1) + "\n")
    (out / "kernels.md").write_text(markdown(records))
    misfits = [record for record in records if not record.fits]
    for record in misfits:
        print("does not fit:", record, file=sys.stderr)
    most = max(record.registers for record in records)
    shared = max(record.shared for record in records)
    print(
        f"{len(records)} kernels in {time.monotonic() - began:.0f} s: {len(misfits)} do not fit, "
        f"at most {most} registers and {shared} bytes of shared memory; see {out}"
    )
    return 1 if misfits else 0


if __name__ == "__main__":
    sys.exit(main())
