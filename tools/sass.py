"""Reads the machine code (SASS) of a compiled kernel, and counts its instructions by what they do.

Needs no GPU: triton carries the disassembler, and `triton.compile(...).asm["cubin"]` is the file.
Counts are of instructions as they stand in the code, one per warp: predicated ones count in full,
and how long each one takes depends on its pipe.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec
from pathlib import Path


class Kind(Enum):
    """What an instruction does, as far as its cost goes."""

    INTEGER = "integer"
    MOVE = "move"
    CONVERT = "convert"
    HALF = "half"
    FLOAT = "float"
    SPECIAL = "special"
    TENSOR = "tensor"
    GLOBAL_LOAD = "global load"
    GLOBAL_STORE = "global store"
    SHARED_LOAD = "shared load"
    SHARED_STORE = "shared store"
    SHUFFLE = "shuffle"
    BARRIER = "barrier"
    CONTROL = "control"
    UNIFORM = "uniform"
    NOP = "nop"  # NOP, and what a predicate keeps from ever executing: slots without work
    OTHER = "other"


# By the opcode's first part. What is not here and begins with U is uniform, all else `other`:
# double precision, atomics, votes, constants and local memory (spills) too, to be read by name.
_OPCODES = {
    Kind.INTEGER: "BFE BFI BMSK BREV FLO IABS IADD IADD3 IADD32I ICMP IDP IDP4A IMAD IMNMX IMUL "
    "ISCADD ISETP LEA LOP LOP3 LOP32I P2R PLOP3 POPC PRMT PSETP R2P SEL SGXT SHF SHL SHR VABSDIFF "
    "VABSDIFF4 VIADD VIADDMNMX VIMNMX VIMNMX3",
    Kind.MOVE: "MOV MOV32I",
    Kind.CONVERT: "F2F F2FP F2I F2IP FRND I2F I2FP I2I I2IP",
    Kind.HALF: "HADD2 HADD2_32I HFMA2 HFMA2_32I HMNMX2 HMUL2 HMUL2_32I HSET2 HSETP2",
    Kind.FLOAT: "FADD FADD2 FADD32I FCHK FFMA FFMA2 FFMA32I FMNMX FMNMX3 FMUL FMUL2 FMUL32I FSEL "
    "FSET FSETP FSWZADD",
    Kind.SPECIAL: "MUFU",
    Kind.TENSOR: "BGMMA BMMA DMMA HGMMA HMMA IGMMA IMMA OMMA QGMMA QMMA UTCHMMA UTCIMMA UTCOMMA "
    "UTCQMMA",
    Kind.GLOBAL_LOAD: "LD LDG LDGSTS UBLKCP UTMALDG",
    Kind.GLOBAL_STORE: "ST STG UTMASTG",
    Kind.SHARED_LOAD: "LDS LDSM",
    Kind.SHARED_STORE: "STS STSM",
    Kind.SHUFFLE: "SHFL",
    Kind.BARRIER: "ARRIVES B2R BAR CGABAR CGAERRBAR DEPBAR ERRBAR FENCE LDGDEPBAR MEMBAR R2B SYNCS "
    "UCGABAR UCGABAR_ARV UCGABAR_WAIT UTCBAR UTMACMDFLUSH WARPGROUP WARPGROUPSET WARPSYNC",
    Kind.CONTROL: "BMOV BPT BRA BREAK BRX BRXU BSSY BSYNC CALL EXIT JMP JMX JMXU KILL NANOSLEEP "
    "PREEXIT RET RPCMOV USETMAXREG YIELD",
    Kind.UNIFORM: "CS2UR LDCU R2UR S2UR VOTEU",
    Kind.NOP: "NOP",
}
_KIND_OF = {name: kind for kind, names in _OPCODES.items() for name in names.split()}
_MEMORY = (Kind.GLOBAL_LOAD, Kind.GLOBAL_STORE, Kind.SHARED_LOAD, Kind.SHARED_STORE)
_BULK = {"UBLKCP", "UTMALDG", "UTMASTG"}  # a descriptor or a register holds their size
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_MATRICES = {"4": 16, "2": 8}  # 8x8 matrices of LDSM and STSM: 4 bytes a thread each
NEVER = {"!PT", "!UPT"}  # predicates
_JUMPS = {"BRA", "JMP"}

_ADDRESS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/")
_FUNCTION = re.compile(r"^\s*Function : (\S+)")
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z]\S*?)(?:\s+([^;]*?))?\s*;")
_EXAMPLE = "/*0000*/ @P0 MOV R1, R2 ;"
_COMMA = re.compile(r",\s*(?![^\[(]*[\])])")  # no comma inside brackets


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction; `predicate` is as in "!P0", `opcode` as in "LDGSTS.E.BYPASS.128", `target`
    the address that a branch or call may go on at, when it is printed. Addresses are bytes from
    the start of the function."""

    function: str
    address: int
    predicate: str | None
    opcode: str
    operands: tuple[str, ...]
    target: int | None

    @property
    def base(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def modifiers(self) -> tuple[str, ...]:
        return tuple(self.opcode.split(".")[1:])


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts of instructions. `other` are those of no known kind, by opcode. `widths` counts the
    accesses to memory by bytes a thread; None: the opcode does not say (TMA)."""

    kinds: Mapping[Kind, int]
    opcodes: Mapping[str, int]
    other: Mapping[str, int]
    widths: Mapping[Kind, Mapping[int | None, int]]

    @property
    def instructions(self) -> int:
        return sum(self.kinds.values())

    @property
    def global_bytes(self) -> Mapping[int, int]:
        """Bytes a thread loads from global memory, by the width of the loads, TMA left out."""
        loads = self.widths[Kind.GLOBAL_LOAD].items()
        return {width: width * count for width, count in loads if width is not None}

    @property
    def has_16_byte_loads(self) -> bool:
        """Whether a load from global memory takes 16 bytes a thread or more."""
        return any(width >= 16 for width in self.global_bytes)


def disassemble(cubin: bytes) -> list[Instruction]:
    """The instructions of every function of a cubin.

    Raises ValueError when the disassembler finds none.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump()), "-sass", file.name]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(
            f"expected a cubin, found {len(cubin)} bytes that cuobjdump leaves with "
            f"{done.returncode}: {(done.stderr or done.stdout).strip()[:200]!r}"
        )
    return parse(done.stdout)


def cuobjdump() -> Path:
    """The disassembler that triton carries."""
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("expected the package triton, which has cuobjdump; found none")
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def parse(text: str) -> list[Instruction]:
    """The instructions in what `cuobjdump -sass` prints. Raises ValueError when there are none, or
    at a line with an address that is none."""
    function, found = "", list[Instruction]()
    for line in text.splitlines():
        if heading := _FUNCTION.match(line):
            function = heading[1]
        elif _ADDRESS.match(line):
            found.append(_instruction(function, line))
    if not found:
        raise ValueError(
            f"expected lines such as {_EXAMPLE!r} from cuobjdump, found {text[:200]!r}"
        )
    return found


def _instruction(function: str, line: str) -> Instruction:
    match = _LINE.match(line)
    if match is None:
        raise ValueError(f"expected a line such as {_EXAMPLE!r} from cuobjdump, found {line!r}")
    address, predicate, opcode, rest = match.groups()
    operands = tuple(_COMMA.split(rest)) if rest else ()
    target = _target(opcode.partition(".")[0], operands)
    return Instruction(function, int(address, 16), predicate, opcode, operands, target)


def _target(base: str, operands: tuple[str, ...]) -> int | None:
    """Where a branch may go. BSSY's operand is where threads meet again: BSYNC stands before it.
    WARPSYNC branches when it has two operands; alone, its operand is a mask."""
    branches = base in _JUMPS | {"CALL"} or (base == "WARPSYNC" and len(operands) == 2)
    if branches and operands and re.fullmatch(r"0x[0-9a-f]+", operands[-1]):
        return int(operands[-1], 16)
    return None


def classify(instruction: Instruction) -> Kind:
    """The kind of an instruction; `Kind.OTHER` for what is not known.

    A register is also copied, or set, by sums with zero on the pipes of integers and halves, and a
    half made a float by adding zero: these are moves and conversions here.
    """
    if instruction.predicate in NEVER:
        return Kind.NOP
    if _is_move(instruction):
        return Kind.MOVE
    base = instruction.base
    if base == "HADD2" and "F32" in instruction.modifiers and _zeros(instruction, 1):
        return Kind.CONVERT
    return _KIND_OF.get(base, Kind.UNIFORM if base.startswith("U") else Kind.OTHER)


def _is_move(instruction: Instruction) -> bool:
    modifiers = instruction.modifiers
    match instruction.base:
        case "IMAD":
            copies = modifiers == ("U32",) and _zeros(instruction, 2)
            return copies or "MOV" in modifiers
        case "HFMA2":
            return _zeros(instruction, 2)
        case "CS2R":
            return instruction.operands[-1:] == ("SRZ",)
    return False


def _zeros(instruction: Instruction, count: int) -> bool:
    """Whether the first `count` sources are the zero register."""
    sources = instruction.operands[1 : 1 + count]
    return len(sources) == count and {source.lstrip("-") for source in sources} == {"RZ"}


def access_width(instruction: Instruction) -> int | None:
    """Bytes that a thread loads or stores; None for TMA and for what is no access to memory."""
    base = instruction.base
    if base in _BULK or _KIND_OF.get(base) not in _MEMORY:
        return None
    sizes = _MATRICES if base in {"LDSM", "STSM"} else _WIDTHS
    return next((sizes[part] for part in instruction.modifiers if part in sizes), 4)


def tally(instructions: Iterable[Instruction]) -> Tally:
    """Count the instructions, say a loop's `inline`."""
    kinds, opcodes, other = Counter[Kind](), Counter[str](), Counter[str]()
    widths = {kind: Counter[int | None]() for kind in _MEMORY}
    for instruction in instructions:
        kind = classify(instruction)
        kinds[kind] += 1
        skipped = f"@{instruction.predicate} " if instruction.predicate in NEVER else ""
        opcodes[skipped + instruction.opcode] += 1
        if kind is Kind.OTHER:
            other[instruction.opcode] += 1
        if kind in widths:
            widths[kind][access_width(instruction)] += 1
    return Tally(kinds, opcodes, other, widths)


def per_value(counts: Tally, values_per_thread: float) -> dict[Kind, float]:
    """Instructions by kind for each of the values that a thread takes in one turn of the loop."""
    if values_per_thread <= 0:
        raise ValueError(f"expected values_per_thread above 0, found {values_per_thread}")
    return {kind: counts.kinds.get(kind, 0) / values_per_thread for kind in Kind}
