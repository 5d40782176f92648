"""The picture of cache formats: quality against bytes, one curve a family."""

import io
from collections.abc import Iterator

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, NullFormatter

from stillhouse.workers.cache_quality.report import QualityReport, QualityRow

# Okabe and Ito's colours, which most kinds of colour vision tell apart; ours are the bold ones.
_LOOKS = {
    "fitted": ("#D55E00", "o", 2.5),
    "mse": ("#0072B2", "o", 2.0),
    "prod": ("#56B4E9", "s", 1.2),
    "polar": ("#56B4E9", "D", 1.2),
    "vllm": ("#009E73", "^", 1.2),
    "vllm, all layers": ("#009E73", "v", 1.2),
    "quanto": ("#CC79A7", "s", 1.2),
    "hqq": ("#E69F00", "s", 1.2),
    "fp8": ("#777777", "D", 1.2),
    "bf16": ("#000000", "D", 1.2),
}
_LEAST_KL = 1e-5  # nats; what is below is drawn there


def draw_quality(report: QualityReport, title: str) -> str:
    """An SVG: bytes a token and mean next-token KL, both logarithmic; the same bytes each time."""
    with matplotlib.rc_context({"svg.hashsalt": "stillhouse", "font.size": 10}):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        for curve, rows in _curves(report):
            _draw(axes, curve, rows)
        axes.set(xscale="log", yscale="log", title=title)
        axes.set_xlabel("bytes of cache a token, all in but the tables")
        axes.set_ylabel("next-token KL against full precision, nats")
        axes.xaxis.set_major_formatter(LogFormatter(labelOnlyBase=False))
        axes.xaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(which="both", alpha=0.2)
        axes.legend(fontsize=9)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _curves(report: QualityReport) -> Iterator[tuple[str, list[QualityRow]]]:
    measured = [row for row in report.rows if row.figures]
    for curve in dict.fromkeys(row.form.curve for row in measured):
        yield curve, [row for row in measured if row.form.curve == curve]


def _draw(axes: Axes, curve: str, rows: list[QualityRow]) -> None:
    points = sorted((row.mean("bytes_per_token") or 0, row.mean("kl_mean") or 0) for row in rows)
    colour, marker, width = _LOOKS[curve]
    dashed = "--" if curve.endswith("all layers") else "-"
    axes.plot(
        [size for size, _ in points],
        [max(kl, _LEAST_KL) for _, kl in points],
        color=colour, marker=marker, linewidth=width, linestyle=dashed, markersize=5, label=curve,
    )  # fmt: skip
