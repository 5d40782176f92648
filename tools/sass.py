"""Reads the machine code (SASS) of a compiled kernel and says what its loops do.

    python tools/sass.py FILE.cubin [--values N]

Needs no GPU: triton carries the disassembler, and `triton.compile(...).asm["cubin"]` is the file.
Counts are of instructions as they stand in the code, one per warp: predicated ones count in full,
and how long each one takes depends on its pipe.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec
from itertools import groupby, pairwise
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
_ALWAYS, _NEVER = {None, "PT", "UPT"}, {"!PT", "!UPT"}
_JUMPS, _ENDS, _INDIRECT = {"BRA", "JMP"}, {"EXIT", "KILL", "RET"}, {"BRX", "BRXU", "JMX", "JMXU"}

_WAITING = {"BRA", "NANOSLEEP", "NOP", "PLOP3", "SYNCS", "USETMAXREG", "YIELD"}

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
class Loop:
    """A loop, from `header`, where it is entered.

    `inline` are the instructions around the header without a gap, those of inner loops included.
    `out_of_line` stand elsewhere: slow paths that come back, and subroutines called from nowhere
    else (once, however often they are called). `outer` is the header of the next loop around it,
    `depth` 1 where there is none. An `innermost` loop has none in it but such as only wait.
    """

    function: str
    header: int
    outer: int | None
    depth: int
    innermost: bool
    inline: tuple[Instruction, ...]
    out_of_line: tuple[Instruction, ...]

    @property
    def body(self) -> tuple[Instruction, ...]:
        """All instructions in the order of their addresses."""
        return tuple(sorted(self.inline + self.out_of_line, key=lambda i: i.address))

    @property
    def waits(self) -> bool:
        """Whether it only asks again, for a barrier or for registers."""
        return _wait(self.body)


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
        command = [str(_cuobjdump()), "-sass", file.name]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(
            f"expected a cubin, found {len(cubin)} bytes that cuobjdump leaves with "
            f"{done.returncode}: {(done.stderr or done.stdout).strip()[:200]!r}"
        )
    return parse(done.stdout)


def _cuobjdump() -> Path:
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
    if instruction.predicate in _NEVER:
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
        skipped = f"@{instruction.predicate} " if instruction.predicate in _NEVER else ""
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


def loops(instructions: Iterable[Instruction]) -> list[Loop]:
    """The loops of each function, inner ones before those around them.

    A loop is a set of blocks from each of which control can come to each other; inner ones are what
    remains of it without its header. Raises ValueError at a branch to a computed address.
    """
    return [
        loop
        for _, code in groupby(instructions, key=lambda i: i.function)
        for loop in _function_loops(list(code))
    ]


# A block is a run of instructions entered at its first only; its name is that one's address.
_Blocks = Mapping[int, tuple[Instruction, ...]]
_Graph = Mapping[int, set[int]]


@dataclass(frozen=True, slots=True)
class _Nest:
    """A loop as a set of blocks; `height` is 0 for an innermost one."""

    header: int
    blocks: set[int]
    outer: int | None
    depth: int
    height: int


@dataclass(frozen=True, slots=True)
class _Subroutine:
    """Blocks that are called and only ever return, and the blocks that call them."""

    blocks: set[int]
    callers: set[int]


def _function_loops(code: list[Instruction]) -> list[Loop]:
    blocks = _blocks(code)
    graph = _reachable(_graph(blocks), code[0].address)
    nests = sorted(_nests(set(graph), graph), key=lambda nest: (nest.height, nest.header))
    waits = {n.header for n in nests if _wait(i for start in n.blocks for i in blocks[start])}
    around = {nest.outer for nest in nests if nest.header not in waits}
    subroutines = _subroutines(blocks, graph)
    return [
        _loop(nest, nest.header not in around, blocks, _near(nest, blocks, graph), subroutines)
        for nest in nests
    ]


def _wait(instructions: Iterable[Instruction]) -> bool:
    return all(instruction.base in _WAITING for instruction in instructions)


def _blocks(code: list[Instruction]) -> _Blocks:
    leaders = {code[0].address} | {i.target for i in code if i.target is not None}
    leaders |= {after.address for before, after in pairwise(code) if _ends_block(before)}
    starts = [at for at, instruction in enumerate(code) if instruction.address in leaders]
    ends = [*starts[1:], len(code)]
    pairs = zip(starts, ends, strict=True)
    return {code[start].address: tuple(code[start:end]) for start, end in pairs}


def _ends_block(instruction: Instruction) -> bool:
    return instruction.target is not None or instruction.base in _ENDS | _INDIRECT


def _graph(blocks: _Blocks) -> _Graph:
    """Block -> the blocks that may come next. A call may go to its target, which need not return
    (sm_80 leaves loops with a call), and on: what returns leads nowhere itself."""
    graph: dict[int, set[int]] = {}
    for (start, block), following in zip(blocks.items(), [*list(blocks)[1:], -1], strict=True):
        graph[start] = _next(block[-1], following) & blocks.keys()
    return graph


def _next(last: Instruction, following: int) -> set[int]:
    if last.base in _INDIRECT:
        raise ValueError(
            f"expected branches with their target, found {last.opcode} at {last.address:#x} of "
            f"{last.function}: where it goes is not printed"
        )
    always = last.predicate in _ALWAYS
    if last.predicate in _NEVER:
        return {following}
    if last.base in _ENDS:
        return set() if always else {following}
    if last.target is None:
        return {following}
    if last.base in _JUMPS and always and len(last.operands) == 1:
        return {last.target} - {last.address}  # a jump to itself is where code ends, no loop
    return {following, last.target}


def _reach(start: int, graph: _Graph) -> set[int]:
    """Blocks to which one or more steps lead from `start`."""
    found, waiting = set[int](), [start]
    while waiting:
        fresh = graph[waiting.pop()] - found
        found |= fresh
        waiting.extend(fresh)
    return found


def _reachable(graph: _Graph, entry: int) -> _Graph:
    kept = _reach(entry, graph) | {entry}
    return {block: graph[block] for block in graph if block in kept}


def _reverse(graph: _Graph) -> _Graph:
    back: dict[int, set[int]] = {block: set() for block in graph}
    for block, following in graph.items():
        for next_ in following:
            back[next_].add(block)
    return back


def _nests(nodes: set[int], graph: _Graph, outer: int | None = None, depth: int = 1) -> list[_Nest]:
    """The loops among `nodes`, each after those inside it."""
    part = {block: graph[block] & nodes for block in sorted(nodes)}
    back = _reverse(part)
    found, seen = list[_Nest](), set[int]()
    for block in part:
        cycle = set[int]() if block in seen else _reach(block, part) & _reach(block, back)
        if cycle:
            seen |= cycle
            header = _header(cycle, graph)
            inner = _nests(cycle - {header}, graph, header, depth + 1)
            height = 1 + max((nest.height for nest in inner), default=-1)
            found += [*inner, _Nest(header, cycle, outer, depth, height)]
    return found


def _header(cycle: set[int], graph: _Graph) -> int:
    """The block through which a loop is entered; the first where several are (or none is)."""
    entries = {next_ for block in graph if block not in cycle for next_ in graph[block] & cycle}
    return min(entries or cycle)


def _subroutines(blocks: _Blocks, graph: _Graph) -> list[_Subroutine]:
    callers: dict[int, set[int]] = {}
    for start in graph:
        last = blocks[start][-1]
        if last.base == "CALL" and last.target is not None:
            callers.setdefault(last.target, set()).add(start)
    return [
        _Subroutine(body, calling)
        for entry, calling in callers.items()
        if _returns(body := _reach(entry, graph) | {entry}, blocks) and not body & calling
    ]


def _returns(body: set[int], blocks: _Blocks) -> bool:
    """Whether this is left by returning, never by ending the thread."""
    ends = {blocks[block][-1].base for block in body}
    return "RET" in ends and not ends & {"EXIT", "KILL"}


def _loop(
    nest: _Nest,
    innermost: bool,
    blocks: _Blocks,
    near: set[int],
    subroutines: list[_Subroutine],
) -> Loop:
    called = [routine.blocks for routine in subroutines if routine.callers <= nest.blocks]
    inline, out_of_line = (
        tuple(instruction for start in sorted(part) for instruction in blocks[start])
        for part in (near, nest.blocks.union(*called) - near)
    )
    function = inline[0].function
    return Loop(function, nest.header, nest.outer, nest.depth, innermost, inline, out_of_line)


def _near(nest: _Nest, blocks: _Blocks, graph: _Graph) -> set[int]:
    """The blocks that stand around the header with no other between, up to the last that goes back
    to it: behind that one, compilers put slow paths."""
    order = list(blocks)
    first = last = order.index(nest.header)
    while first > 0 and order[first - 1] in nest.blocks:
        first -= 1
    for at in range(last + 1, len(order)):
        if order[at] not in nest.blocks:
            break
        last = at if nest.header in graph[order[at]] else last
    return set(order[first : last + 1])


def table(found: list[Loop], values: float | None = None) -> str:
    """Markdown: a column for each loop, a row for each kind, instructions in line. With `values`,
    what a thread takes in one turn, each count is followed by that for one value."""
    counts = [tally(loop.inline) for loop in found]
    rows = [["kind", *(f"{loop.header:#x}" for loop in found)], ["---", *("---:" for _ in found)]]
    rows.append(["depth", *(str(loop.depth) for loop in found)])
    rows.append(["inside", *("" if loop.outer is None else f"{loop.outer:#x}" for loop in found)])
    rows.append(["only waits", *("yes" if loop.waits else "no" for loop in found)])
    for kind in Kind:
        if any(kind in count.kinds for count in counts):
            rows.append([kind.value, *(_cell(count, kind, values) for count in counts)])
    rows.append(["all", *(str(count.instructions) for count in counts)])
    rows.append(["out of line", *(str(len(loop.out_of_line)) for loop in found)])
    rows.append(["global bytes", *(str(sum(count.global_bytes.values())) for count in counts)])
    rows.append(["loads of 16", *("yes" if c.has_16_byte_loads else "no" for c in counts)])
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def _cell(counts: Tally, kind: Kind, values: float | None) -> str:
    count = str(counts.kinds.get(kind, 0))
    return count if values is None else f"{count} ({per_value(counts, values)[kind]:.2f})"


def details(loop: Loop) -> str:
    """The opcodes of a loop and its accesses to memory, in lines of text."""
    counts = tally(loop.inline)
    lines = [f"{loop.header:#x} to {loop.inline[-1].address:#x}: {_listed(counts.opcodes)}"]
    for kind, widths in counts.widths.items():
        named = {"by TMA" if w is None else f"of {w} bytes": n for w, n in widths.items()}
        if named:
            lines.append(f"  {kind.value}s: {_listed(named)}")
    if counts.other:
        lines.append(f"  of no known kind: {_listed(counts.other)}")
    return "\n".join(lines) + "\n"


def _listed(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {name}" for name, count in ordered)


def report(instructions: list[Instruction], values: float | None = None) -> str:
    """The table and the details of the loops of every function."""
    found, lines = loops(instructions), list[str]()
    for function, size in Counter(i.function for i in instructions).items():
        own = [loop for loop in found if loop.function == function]
        lines.append(f"{function}: {size} instructions, loops: {len(own)}\n")
        if own:
            lines += [table(own, values), *map(details, own)]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="say what the loops of a compiled kernel do")
    parser.add_argument("cubin", type=Path)
    parser.add_argument("--values", type=float, help="values that a thread takes in one turn")
    given = parser.parse_args()
    try:
        print(report(disassemble(given.cubin.read_bytes()), given.values), end="")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
