"""`stillhouse bench`: measurements of a model's cache."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stillhouse.errors import ConfigError

if TYPE_CHECKING:
    from stillhouse.pipelines.cache_quality import QualityJob, QualityReport, QualitySource

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Measure what a choice costs and saves."""


@app.command("cache-quality")
def cache_quality(
    model: Annotated[str, typer.Option(help="A model: a folder, package:… or a hub name.")],
    out: Annotated[Path, typer.Option("--json", metavar="OUT", help="Where the table goes.")],
    text: Annotated[
        Path | None,
        typer.Option(help="A text: its first half calibrates, its second is measured on."),
    ] = None,
    corpus: Annotated[
        str | None, typer.Option(metavar="RUN", help="Instead of --text: a run's corpus.")
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(help="mse:4, fitted:3.5, vllm:4bit_nc, …; several with commas; else all."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Rotations and calibrations to draw.")] = 1,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to measure on.")] = 8192,
    calibration_tokens: Annotated[
        int, typer.Option(min=64, help="Tokens to calibrate on, half of them a second time.")
    ] = 16384,
    window: Annotated[int, typer.Option(min=16, help="Tokens read at once.")] = 1024,
) -> None:
    """Perplexity, next-token KL and retrieval of every cache format, ours and others'."""
    from stillhouse.cli.quality_table import show_quality
    from stillhouse.pipelines.cache_quality import ask_quality, check_destination, write_quality

    check_destination(out)
    source = _source(text, corpus)
    names = tuple(word.strip() for entry in formats or () for word in entry.split(","))
    chosen = tuple(filter(None, names))
    job = ask_quality(source, chosen, seeds, tokens, calibration_tokens, window)
    report = _measured(model, job)
    show_quality(report)
    picture = write_quality(model, source, job, report, out)
    print(f"Everything: {out}\nPicture: {picture}")


def _source(text: Path | None, corpus: str | None) -> "QualitySource":
    """The texts of a file or of a run; ConfigError unless one of them is named."""
    from stillhouse.cli.runs import open_catalog
    from stillhouse.pipelines.cache_quality import corpus_source, text_source

    if text is not None and corpus is None:
        return text_source(text)
    if corpus is not None and text is None:
        with open_catalog(corpus) as catalog:
            return corpus_source(corpus, catalog)
    raise ConfigError(
        "bench cache-quality: expected --text or --corpus, found "
        f"{'neither' if text is None else 'both'}. Give one"
    )


def _measured(model: str, job: "QualityJob") -> "QualityReport":
    """With a bar of what is done."""
    from stillhouse.cli.console import Console
    from stillhouse.pipelines.cache_quality import bench_cache_quality

    with Console() as console:
        console.stage_started("bench", "", 0)
        report = bench_cache_quality(
            model,
            job,
            lambda what, done, total: console.progress("bench", done, total, what),
            console.note,
        )
        if report.tokens < job.tokens:
            found = f"the text has {report.tokens:,} tokens to measure on, not {job.tokens:,}"
            console.note(found)
    return report
