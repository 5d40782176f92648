"""What the commands print on standard output."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console as Terminal
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from stillhouse.pipelines.cache_planning import CachePlan, CacheRow
from stillhouse.pipelines.diagnosis import Check
from stillhouse.pipelines.estimates import Estimate
from stillhouse.pipelines.planning import RunStatus, StagePlan
from stillhouse.storage.records import RoundRecord

WIDEST = 10_000  # characters of a line that goes to a file
ARMS = {
    "base": "base",
    "specialist": "specialist",
    "target_before": "target before",
    "student": "student",
    "student_compressed": "student, compressed cache",
    "ceiling": "target on the private data",
}


def show_report(report: Mapping[str, Any], folder: Path) -> None:
    """Print the result table of a run."""
    terminal = Terminal(emoji=False)  # else toy:llama: becomes an animal
    if "accuracy" in report:
        terminal.print(_arms(report))
        terminal.print(_summary(report), highlight=False)
    terminal.print(_stages(report))
    terminal.print(
        f"Everything: {folder}/report.json\n"
        f'Look inside: stillhouse query {folder.name} "SELECT * FROM prompts LIMIT 5"',
        highlight=False,
        markup=False,
    )


def _arms(report: Mapping[str, Any]) -> Table:
    table = Table(
        title=f"{report['name']}: {report['items']} held-out questions",
        caption="perplexity: of a token of the model's own tokenizer; compare within a family",
    )
    for column in ("arm", "exact match", "answer perplexity"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm, label in ARMS.items():
        if arm in report["accuracy"]:
            error = report["standard_error"][arm]
            table.add_row(
                label,
                f"{report['accuracy'][arm]:.1%} ± {error:.1%}",
                _perplexity(report["perplexity"][arm]),
            )
    return table


def _perplexity(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _summary(report: Mapping[str, Any]) -> str:
    lines = []
    if report["recovery"] is not None:
        lines.append(f"recovery {report['recovery']:.2f}")
    if "selection" in report:
        shares = (
            f"{origin} {figures['reject_rate']:.0%} of {figures['rows']:,}"
            for origin, figures in report["selection"].items()
        )
        lines.append(f"rejected by origin: {', '.join(shares)}")
    if "cache" in report:
        cache = report["cache"]
        full, small = cache["bytes_per_token_16bit"], cache["bytes_per_token"]
        lines.append(
            f"cache {full:,.0f} → {small:,.0f} bytes a token ({full / small:.2f}×), next-token KL "
            f"{cache['kl_mean']:.4f} nats, perplexity {cache['perplexity_change']:+.1%}; tables "
            f"{cache['table_bytes'] / 2**20:.1f} MiB, shared by all sequences"
        )
    deployment = report.get("deployment")
    if deployment:
        lines.append(f"student {deployment['name']}: {_verdict(deployment)}")
    return "\n".join(lines)


def _verdict(deployment: Mapping[str, Any]) -> str:
    if deployment["refused"]:
        return f"refused, not registered: {deployment['refused']}"
    if deployment["promoted"]:
        return "passed the gate"
    return f"did not pass the gate: {'; '.join(deployment['gate']['reasons'])}"


def _stages(report: Mapping[str, Any]) -> Table:
    table = Table(title="stages")
    for column in ("stage", "seconds", "in", "kept", "rejected", "failed", "tokens/s"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, stage in report["stages"].items():
        rate = stage["tokens_per_second"]
        table.add_row(
            name,
            f"{stage['seconds']:.1f}",
            *(str(stage[column]) for column in ("rows_in", "kept", "rejected", "failed")),
            "" if rate is None else f"{rate:.0f}",
        )
    total = sum(stage["seconds"] for stage in report["stages"].values())
    table.add_row("all", f"{total:.1f}", style="bold")
    return table


def show_plan(stages: Sequence[StagePlan]) -> None:
    """Print what would run, what is reused and why; costs are estimates."""
    table = Table(title="plan")
    for column in ("stage", "state", "why"):
        table.add_column(column, overflow="fold")
    for column in ("≈ rows", "≈ tokens", "≈ time", "≈ MB"):
        table.add_column(column, justify="right")
    for stage in stages:
        table.add_row(stage.stage, stage.state, stage.why, *_costs(stage.cost))
    costs = [stage.cost for stage in stages if stage.cost is not None]
    seconds = sum(cost.seconds for cost in costs)
    tokens, size = sum(cost.tokens for cost in costs), sum(cost.bytes for cost in costs) / 1e6
    table.add_row(
        "all", "", "", "", f"{tokens:,}", _duration(seconds), _estimated(size), style="bold"
    )
    Terminal(emoji=False).print(table)


def _costs(cost: Estimate | None) -> tuple[str, ...]:
    if cost is None:
        return ("", "", "", "")
    return (
        f"{cost.rows:,}",
        f"{cost.tokens:,}",
        _duration(cost.seconds),
        _estimated(cost.bytes / 1e6),
    )


def show_target_cache(plan: CachePlan) -> None:
    """Print how large the target's cache is at its context, a format in a line."""
    terminal = Terminal(emoji=False)
    context = plan.rows[0].context
    terminal.print(
        f"cache of the target at {context:,} tokens, one sequence:", highlight=False, markup=False
    )
    for row in plan.rows:
        text = f"  {row.format}: {_gib(row.gib)} GiB = {_gib(row.gb)} GB"
        terminal.print(f"{text} ({row.size.total:,} bytes)", highlight=False, markup=False)
    _show_value_maps(terminal, plan)


def show_cache(plan: CachePlan) -> None:
    """Print the size of a model's cache, a context and format in a row."""
    asked, layers = plan.question, plan.shape.layers
    sliding = sum(layer.window is not None for layer in layers)
    windows = f", sinks {asked.sinks}, recent {asked.recent}" if asked.sinks or asked.recent else ""
    terminal = wide_terminal()
    title = f"cache of {plan.shape.name}: {len(layers)} layers, {sliding} sliding, batch "
    terminal.print(f"{title}{asked.batch:,}{windows}", highlight=False, markup=False)
    table = Table(
        caption="all in: layers and tokens kept in 16 bits, scalars and tables are counted",
    )
    for column in ("context", "format", "bytes", "GiB", "GB", "bytes a token", "of bf16"):
        table.add_column(column, justify="left" if column == "format" else "right", overflow="fold")
    for row in plan.rows:
        table.add_row(*_cache_cells(row))
    terminal.print(table)
    _show_value_maps(terminal, plan)


def _show_value_maps(terminal: Terminal, plan: CachePlan) -> None:
    for maps in {row.value_maps for row in plan.rows} - {0}:
        text = f"fitted: {maps:,} bytes more where the weights cannot take the values' maps"
        terminal.print(text, highlight=False, markup=False)


def _cache_cells(row: CacheRow) -> tuple[str, ...]:
    size = (f"{row.size.total:,}", _gib(row.gib), _gib(row.gb))
    return (
        f"{row.context:,}",
        row.format,
        *size,
        f"{row.bytes_per_token:,.0f}",
        f"1/{row.ratio:.2f}",
    )


def _gib(value: float) -> str:
    if value >= 10:
        return f"{value:,.1f}"
    return f"{value:#.3g}" if value >= 1e-3 else f"{value:.6f}"


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "?"
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:,.0f} min"


def _estimated(value: float) -> str:
    return "?" if math.isnan(value) else f"{value:,.1f}"


def show_status(status: RunStatus) -> None:
    """Print how far a run is."""
    terminal = Terminal(emoji=False)
    terminal.print(f"{status.name}: {status.holder or 'nobody runs it now'}", highlight=False)
    for stage in status.stages:
        terminal.print(f"  {stage.stage:<10} {stage.state:<8} {stage.why}", highlight=False)
    if status.rounds:
        terminal.print(_rounds(status.rounds))


def _rounds(rounds: Sequence[RoundRecord]) -> Table:
    """Yield and coverage by round; round 0 is seeds and pool."""
    table = Table(
        title="rounds of new prompts",
        caption="gap: p10, p50, p90 in nats a token; what all kept so far cover: different answers "
        "(and how many of them are new), question forms, names",
        box=None,
    )
    names = ("round", "proposed", "again", "new", "kept", "gap", "all", "answers", "forms")
    for column in (*names, "names"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rounds:
        gaps = (row.gap_p10, row.gap_p50, row.gap_p90)
        share = f" {row.kept / row.proposed:.0%}" if row.proposed else ""
        table.add_row(
            *(str(value) for value in (row.round, row.proposed, row.duplicates, row.new)),
            f"{row.kept}{share}",
            " ".join(f"{gap:.2g}" for gap in gaps if gap is not None),
            str(row.kept_so_far),
            f"{row.answers} +{row.new_answers}",
            str(row.forms),
            str(row.entities),
        )
    return table


def show_rows(names: Sequence[str], rows: Iterable[Sequence[Any]], limit: int) -> None:
    """Print a query's first rows."""
    table = Table()
    for name in names:
        table.add_column(Text(name), overflow="fold")  # a part of an id is of no use
    found = list(islice(rows, limit + 1))
    for row in found[:limit]:
        table.add_row(*(Text(_cell(value)) for value in row))  # text, else [x] is markup
    terminal = wide_terminal()
    terminal.print(table)
    if len(found) > limit:
        terminal.print(f"… more than {limit} rows; --limit prints more", style="dim")


def wide_terminal() -> Terminal:
    """A file or a pipe has no width: there a row is a line."""
    terminal = Terminal(emoji=False)
    if not terminal.is_terminal:
        terminal.width = WIDEST
    return terminal


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)


def show_trace(steps: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Print the rows of one datum, in the order of the line."""
    terminal = Terminal(emoji=False)
    for table, row in steps:
        verdict = row.get("reason") or row.get("status") or ""
        terminal.print(f"{row['_stage']}: {table}  {verdict}", style="bold", markup=False)
        for name, value in row.items():
            if value is not None and name != "_stage":
                terminal.print(f"    {name}: {_cell(value)}", markup=False, highlight=False)


def show_checks(checks: Iterable[Check]) -> bool:
    """Print what was checked; True when nothing is missing."""
    terminal = Terminal(emoji=False)
    sound = True
    for check in checks:
        sound &= check.passed
        mark = "[green]✓[/green]" if check.passed else "[red]✗[/red]"
        terminal.print(f"{mark} {escape(f'{check.name}: {check.found}')}", highlight=False)
        if not check.passed:
            terminal.print(f"    {check.cure}", highlight=False, markup=False)
    return sound
