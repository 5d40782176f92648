"""The tables of kernels.md, in Markdown."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from tools.attention_kernels import AttendConfig, OtherConfig
from tools.codec_kernels import CodecConfig
from tools.compiled_kernel import Usage
from tools.hot_loop import LoopCost

_USAGE = ("warps", "registers", "spilled bytes", "shared bytes")
_COUNTS = ("warps an SM", "instructions", "integer", "half", "float", "16-byte loads")
_FIGURES = frozenset({"tile", *_USAGE, *_COUNTS})  # the other columns name a kernel
_ATTEND = ("kernel", "sm", "D", "format", "G", "page", "also", "tile", *_USAGE, *_COUNTS)


def codec_table(found: Mapping[CodecConfig, Usage]) -> str:
    """The largest figures over dtypes and scalars of each kernel."""
    rows = [((c.kernel, c.arch, c.head_dim, c.bits), usage) for c, usage in found.items()]
    return _table(("kernel", "sm", "D", "bits", *_USAGE), _largest(rows))


def other_table(found: Mapping[OtherConfig, Usage]) -> str:
    """The largest figures over the variants of each kernel."""
    rows = [((c.kernel, c.arch, c.head_dim), usage) for c, usage in found.items()]
    return _table(("kernel", "sm", "D", *_USAGE), _largest(rows))


def attend_table(found: Mapping[AttendConfig, tuple[Usage, LoopCost | None]]) -> str:
    """A row for each kernel; counts are for each decoded value. D: with the coded channels of keys
    and of values where there are fewer."""
    return _table(_ATTEND, [_attend_row(c, *figures) for c, figures in found.items()])


def _attend_row(config: AttendConfig, usage: Usage, cost: LoopCost | None) -> list[object]:
    shape = config.shape
    flags = {"raw": shape.raw, "cap": shape.capped, "check": config.check}
    dim, coded = shape.head_dim, (shape.key_channels, shape.value_channels)
    row: list[object] = [
        config.kernel, f"sm_{config.arch}", dim if coded == (dim, dim) else f"{dim} {coded}",
        config.format, shape.group, shape.page,
        " ".join(name for name, given in flags.items() if given),
        config.block, usage.warps, usage.registers, usage.stack, usage.shared,
        usage.resident_warps(config.arch),
    ]  # fmt: skip
    if cost is None:
        return [*row, *["none"] * 5]
    counts = (cost.instructions, cost.integer, cost.half, cost.single)
    return [*row, *(f"{count:.2f}" for count in counts), "yes" if cost.wide else "no"]


def row_names(text: str) -> Counter[tuple[str, ...]]:
    """What tables have rows for: the cells that are no figures."""
    found, heading = Counter[tuple[str, ...]](), list[str]()
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if not cells or cells[0] == "---":
            continue
        if "registers" in cells:
            heading = cells
        else:
            columns = zip(heading, cells, strict=True)
            found[tuple(cell for name, cell in columns if name not in _FIGURES)] += 1
    return found


def _largest(rows: Iterable[tuple[tuple[str | int, ...], Usage]]) -> list[Sequence[object]]:
    """One row for each name, in order."""
    groups: dict[tuple[str | int, ...], list[Usage]] = {}
    for name, usage in rows:
        groups.setdefault(name, []).append(usage)
    figures = ("warps", "registers", "stack", "shared")
    return [
        (*name, *(max(getattr(usage, figure) for usage in group) for figure in figures))
        for name, group in sorted(groups.items())
    ]


def _table(heading: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)
