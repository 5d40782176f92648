"""A run on the terminal: a line a stage, a progress bar on what takes time."""

from types import TracebackType
from typing import Self

from rich.console import Console as Terminal
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from stillhouse.pipelines.observer import Observer
from stillhouse.storage.manifest import StageEntry


class Console(Observer):
    """Prints what a run does. Use it in a `with` block."""

    def __init__(self) -> None:
        self._terminal = Terminal(stderr=True, emoji=False)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._terminal,
            transient=True,
        )
        self._bar: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        self._terminal.print(f"[yellow]•[/yellow] {escape(text)}", highlight=False, soft_wrap=True)

    def stage_cached(self, entry: StageEntry) -> None:
        self._line("[dim]=[/dim]", entry, "finished before, reused")

    def stage_started(self, stage: str, key: str, reused_shards: int) -> None:
        if reused_shards:
            self.note(f"{stage}: {reused_shards} shards cached, going on")
        self._bar = self._progress.add_task(stage, total=None, unit="")

    def progress(self, stage: str, done: int, total: int, unit: str) -> None:
        if self._bar is not None:
            self._progress.update(self._bar, completed=done, total=total, unit=unit)

    def stage_finished(self, entry: StageEntry) -> None:
        if self._bar is not None:
            self._progress.remove_task(self._bar)
            self._bar = None
        rate = f", {entry.tokens / entry.seconds:.0f} tokens/s" if entry.tokens else ""
        self._line("[green]✓[/green]", entry, f"{entry.seconds:.1f} s{rate}")

    def _line(self, mark: str, entry: StageEntry, what: str) -> None:
        counts = entry.counts
        self._terminal.print(
            f"{mark} {entry.stage:<10} {counts.rows_in:>6} in = {counts.kept} kept + "
            f"{counts.rejected} rejected + {counts.failed} failed   [dim]{what}[/dim]",
            highlight=False,
            soft_wrap=True,
        )
