"""Recovery as a picture: a bar an arm, and a line a sweep."""

import io
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.cache_cpu import plain_svg

_SWEPT = re.compile(r"(?P<name>.+) (?P<value>[\d.]+)$")  # `tau 1.5`, `criterion 200`
Recoveries = Mapping[str, Sequence[float]]  # by arm, one a seed


def drawn(recoveries: Recoveries, title: str) -> str:
    """An SVG; arms whose names end in a number are points of a sweep."""
    from matplotlib.figure import Figure

    known = {arm: values for arm, values in recoveries.items() if values}
    bars = {arm: values for arm, values in known.items() if not _SWEPT.match(arm)}
    sweeps = by_sweep(known)
    panels = [name for name in ("tau", "examples") if any(_axis(arm) == name for arm in sweeps)]
    with plain_svg():
        size = (6 + 3.2 * len(panels), max(2.8, 0.4 * len(bars) + 1.2))
        figure = Figure(figsize=size, layout="constrained")
        ratios = [6, *[3.2] * len(panels)]
        axes = figure.subplots(1, 1 + len(panels), squeeze=False, width_ratios=ratios)[0]
        _bars(axes[0], bars)
        axes[0].set_title(title)
        for place, panel in zip(axes[1:], panels, strict=True):
            _lines(place, {arm: it for arm, it in sweeps.items() if _axis(arm) == panel}, panel)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def by_sweep(recoveries: Recoveries) -> dict[str, dict[float, Sequence[float]]]:
    """Points of each sweep, by value."""
    found: dict[str, dict[float, Sequence[float]]] = {}
    for arm, values in recoveries.items():
        if match := _SWEPT.match(arm):
            found.setdefault(match["name"], {})[float(match["value"])] = values
    return found


def _axis(sweep: str) -> str:
    return "tau" if sweep == "tau" else "examples"


def _bars(axes: Any, recoveries: Recoveries) -> None:
    shown = list(recoveries.items())[::-1]
    axes.barh([arm for arm, _ in shown], [statistics.fmean(v) for _, v in shown], alpha=0.4)
    for arm, values in shown:
        axes.plot(values, [arm] * len(values), "o", color="black", markersize=3)
    axes.set_xlabel("recovery: (student - target before) / (specialist - target before)")
    axes.grid(alpha=0.3, axis="x")


def _lines(axes: Any, sweeps: Mapping[str, Mapping[float, Sequence[float]]], axis: str) -> None:
    for name, points in sweeps.items():
        values = sorted(points)
        axes.plot(values, [statistics.fmean(points[v]) for v in values], marker="o", label=name)
    axes.set_xlabel(axis)
    axes.set_ylabel("recovery")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
