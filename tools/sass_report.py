"""Says what the loops of a compiled kernel do.

python -m tools.sass_report FILE.cubin [--values N]
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from tools.sass import Instruction, Kind, Tally, disassemble, per_value, tally
from tools.sass_loops import Loop, loops


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
