"""Runs the PTX that `ptx_writer` writes: straight-line code on 32-bit registers, vectorised."""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]


def run(code: str, constraints: str, inputs: Sequence[Words]) -> list[Words]:
    """The output registers for arrays of input registers; ValueError for what it does not know."""
    kinds = constraints.split(",")
    outputs = kinds.count("=r")
    if kinds[outputs:] != ["r"] * len(inputs):
        raise ValueError(f"expected {kinds[outputs:]} inputs, found {len(inputs)}")
    registers = {f"${outputs + n}": words for n, words in enumerate(inputs)}
    for line in code.splitlines():
        if line in ("{", "}") or line.startswith(".reg"):
            continue
        match = re.fullmatch(r"(\S+) (\S+), (.*);", line)
        if match is None:
            raise ValueError(f"expected an instruction, found {line!r}")
        operation, target, operands = match.groups()
        values = [_value(name, registers) for name in operands.split(", ")]
        registers[target] = np.broadcast_to(_apply(operation, values), inputs[0].shape)
    return [registers[f"${n}"] for n in range(outputs)]


def _value(name: str, registers: dict[str, Words]) -> Words:
    return registers[name] if name in registers else np.array(int(name, 0), dtype=np.uint32)


def _apply(operation: str, values: Sequence[Words]) -> Words:
    match operation:
        case "mov.b32":
            return values[0]
        case "and.b32":
            return values[0] & values[1]
        case "or.b32":
            return values[0] | values[1]
        case "xor.b32":
            return values[0] ^ values[1]
        case "shl.b32":
            return values[0] << values[1]
        case "shr.u32":
            return values[0] >> values[1]
        case "lop3.b32" if values[3] == 0xEA:  # the table of (a & b) | c
            return (values[0] & values[1]) | values[2]
        case "lop3.b32" if values[3] == 0xCA:  # a ? b : c
            return (values[0] & values[1]) | (~values[0] & values[2])
        case "shf.r.wrap.b32":
            both = values[1].astype(np.uint64) << np.uint64(32) | values[0]
            return (both >> (values[2] & 31).astype(np.uint64)).astype(np.uint32)
        case "prmt.b32":
            return _permuted(values[0], values[1], values[2])
        case "add.rn.f16x2" | "mul.rn.f16x2" | "fma.rn.f16x2":
            lanes = [lanes_of(value).astype(np.float64) for value in values]
            # float64 holds products and sums of float16 exactly: one rounding, as the hardware's.
            with np.errstate(all="ignore"):
                found = {
                    "add": lambda: lanes[0] + lanes[1],
                    "mul": lambda: lanes[0] * lanes[1],
                    "fma": lambda: lanes[0] * lanes[1] + lanes[2],
                }[operation[:3]]()
                return found.astype(np.float16).view(np.uint32)[..., 0]
    raise ValueError(f"expected an instruction that is known, found {operation} {values[3:]}")


def _permuted(low: Words, high: Words, selector: Words) -> Words:
    """Bytes of both words by the selector's four nibbles; 8 more takes the byte's sign alone."""
    both = high.astype(np.uint64) << np.uint64(32) | low
    found = np.zeros(np.broadcast_shapes(both.shape, selector.shape), dtype=np.uint32)
    for at in range(4):
        nibble = (selector >> (4 * at) & 15).astype(np.uint64)
        byte = (both >> (np.uint64(8) * (nibble & np.uint64(7))) & np.uint64(255)).astype(np.uint32)
        byte = np.where(nibble & np.uint64(8), (byte >> 7) * np.uint32(255), byte)
        found |= byte.astype(np.uint32) << np.uint32(8 * at)
    return found


def lanes_of(words: Words) -> NDArray[np.float16]:
    """float16 [..., 2]: the lower half of each register first."""
    return np.ascontiguousarray(words)[..., None].view(np.float16)
