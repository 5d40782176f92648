"""The loops of machine code, from the graph of its blocks.

A block is a run of instructions entered at its first only; its name is that one's address.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise

from tools.sass import NEVER, Instruction

_ALWAYS = {None, "PT", "UPT"}
_JUMPS, _ENDS, _INDIRECT = {"BRA", "JMP"}, {"EXIT", "KILL", "RET"}, {"BRX", "BRXU", "JMX", "JMXU"}
_WAITING = {"BRA", "NANOSLEEP", "NOP", "PLOP3", "SYNCS", "USETMAXREG", "YIELD"}


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
    if last.predicate in NEVER:
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
