"""The table of cache formats on standard output."""

from rich.console import Console as Terminal
from rich.table import Table

from stillhouse.pipelines.cache_quality import QualityReport, QualityRow

_COLUMNS = {
    "bytes/token": ("bytes_per_token", "{:,.0f}"),
    "tables MB": ("table_bytes", "{:.2f}"),
    "perplexity": ("perplexity_change", "{:+.2%}"),
    "KL mean": ("kl_mean", "{:.4f}"),
    "KL 99 %": ("kl_p99", "{:.3f}"),
    "top-1": ("top1_agreement", "{:.1%}"),
    "needle": ("needle", "{:.0%}"),
}


def show_quality(report: QualityReport) -> None:
    """Print a row a format; ± is the standard deviation over seeds."""
    table = Table(
        title=f"{report.tokens:,} tokens in {report.windows} windows, perplexity "
        f"{report.perplexity:.4g} in full precision",
        caption=f"perplexity: change; needle: of what full precision finds in {_lengths(report)}",
    )
    table.add_column("format")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    for row in report.rows:
        if row.note is not None:
            table.add_row(row.form.name, row.note)
            continue
        table.add_row(row.form.name, *(_cell(row, *column) for column in _COLUMNS.values()))
    Terminal(emoji=False).print(table)


def _lengths(report: QualityReport) -> str:
    shares = (f"{length:,} tokens ({share:.0%})" for length, share in report.needle_full.items())
    return ", ".join(shares) or "no length that its context admits"


def _cell(row: QualityRow, name: str, layout: str) -> str:
    value, spread = row.mean(name), row.spread(name)
    if value is None:
        return ""
    scale = 1e-6 if name == "table_bytes" else 1.0
    if not spread:
        return layout.format(scale * value)
    return f"{layout.format(scale * value)} ± {layout.replace('+', '').format(scale * spread)}"
