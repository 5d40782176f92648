"""The table of cache formats on standard output."""

from rich.table import Table

from stillhouse.cli.tables import wide_terminal
from stillhouse.pipelines.cache_quality import QualityReport, QualityRow

_COLUMNS = {
    "bytes": ("bytes_per_token", "{:,.0f}"),
    "tables": ("table_bytes", "{:.2f}"),
    "ppl": ("perplexity_change", "{:+.2%}"),
    "KL": ("kl_mean", "{:.4f}"),
    "KL p99": ("kl_p99", "{:.3f}"),
    "top-1": ("top1_agreement", "{:.1%}"),
    "needle": ("needle", "{:.0%}"),
}
_EXPLAINED = (
    "bytes: of cache a token, without tables (MB, once a model); ppl: change of perplexity; KL: "
    "of the next token, nats; needle: of what full precision finds in "
)


def show_quality(report: QualityReport) -> None:
    """Print a row a format, ± the standard deviation over seeds, and why rows are empty."""
    table = Table(
        title=f"{report.tokens:,} tokens in {report.windows} windows, perplexity "
        f"{report.perplexity:.4g} in full precision",
        caption=_EXPLAINED + _lengths(report),
    )
    table.add_column("format", no_wrap=True)
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.rows:
        if row.note is not None:
            table.add_row(row.form.name)
            continue
        table.add_row(row.form.name, *(_cell(row, *column) for column in _COLUMNS.values()))
    terminal = wide_terminal()
    terminal.print(table)
    for row in report.rows:
        if row.note is not None:
            terminal.print(f"{row.form.name}: {row.note}", highlight=False, markup=False)


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
