"""Compiles one Triton kernel for a GPU that need not be there, and reads what it takes.

A kernel is compiled as a launch would compile it: its options come from the launcher's own
functions, tensors start at, and strides are, multiples of 16.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tools.sass import cuobjdump

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # a block's most, by architecture
_RESERVED = 1024  # bytes of shared memory of each block that the system keeps, beyond those
_REGISTERS = 64 * 1024  # of an SM, in units of 8 a thread
_MOST_BLOCKS = 32  # on an SM


class Launch(NamedTuple):
    """One specialisation of a kernel.

    given: constants by parameter, None for a tensor that is not there, and, under other names, the
    compiler's options. types: of parameters other than int32, such as "*fp16". plain: integers of
    any value, such as counts; all others are multiples of 16.
    """

    function: Any
    given: Mapping[str, Any]
    types: Mapping[str, str]
    plain: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Usage:
    """What a compiled kernel takes: registers a thread, bytes of stack a thread, of shared memory
    a block. Kernels use no stack but for spilled registers."""

    registers: int
    stack: int
    shared: int
    warps: int

    def resident_warps(self, arch: int) -> int:
        """How many are on an SM at a time."""
        threads = 32 * self.warps
        by_registers = _REGISTERS // (threads * -(-self.registers // 8) * 8)
        by_shared = (SHARED_BYTES[arch] + _RESERVED) // (self.shared + _RESERVED)
        return self.warps * min(by_registers, by_shared, _MOST_BLOCKS)

    def faults(self, arch: int) -> list[str]:
        """Why it would not run, or slowly; empty where it fits."""
        found = []
        if self.stack:
            found.append(f"spills {self.stack} bytes")
        if self.shared > SHARED_BYTES[arch]:
            found.append(f"takes {self.shared} bytes of shared memory of {SHARED_BYTES[arch]}")
        return found


def compile_kernel(launch: Launch, arch: int) -> tuple[Usage, bytes]:
    """What the kernel takes, and its machine code (a cubin)."""
    function, given, types, plain = launch
    names: list[str] = function.arg_names
    constants = {name: value for name, value in given.items() if name in names}
    options = {name: value for name, value in given.items() if name not in names}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32") for name in names
    }
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if name not in plain and (signature[name] == "i32" or signature[name].startswith("*"))
    }
    source = ASTSource(function, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cubin: bytes = compiled.asm["cubin"]
    registers, stack = _resource_usage(cubin)
    return Usage(registers, stack, compiled.metadata.shared, options["num_warps"]), cubin


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack (with local memory) of the one kernel of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump()), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    if found is None:
        raise ValueError(f"expected REG, STACK and LOCAL from cuobjdump, found {text!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local
