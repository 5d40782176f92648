"""The command line. Heavy packages are imported after the arguments are parsed."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from stillhouse.cli import bench, serving
from stillhouse.cli.runs import find_run, open_catalog
from stillhouse.errors import ConfigError, StillhouseError

if TYPE_CHECKING:
    from stillhouse.configs.recipe import RecipeConfig

app = typer.Typer(
    name="stillhouse",
    help="Distil what a specialist language model knows into another model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(bench.app, name="bench")
app.command()(serving.serve)
app.command()(serving.chat)
app.command()(serving.deploy)

RecipeArgument = Annotated[str, typer.Argument(help="A shipped recipe's name, or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides such as distill.epochs=3.", show_default=False)
]
RunArgument = Annotated[str, typer.Argument(help="A run's name under runs/, or its folder.")]


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resume: Annotated[
        Literal["auto", "never", "must"],
        typer.Option(help="auto: go on; never: from the start; must: refuse to start anew."),
    ] = "auto",
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
) -> None:
    """Run a recipe; a run that was stopped goes on where it stopped."""
    from stillhouse.cli.console import Console
    from stillhouse.cli.tables import show_report
    from stillhouse.pipelines.tracked import run_tracked

    config = _recipe(recipe, overrides)
    try:
        with Console() as console:
            report = run_tracked(config, console, resume, until)
    except KeyboardInterrupt:  # here: Typer ends without a word
        print("stillhouse: stopped; run the same command again to go on", file=sys.stderr)
        raise typer.Exit(130) from None
    show_report(report, Path(config.runs_root) / config.name)
    refused = report.get("deployment", {}).get("refused")
    if refused:
        raise typer.Exit(10)


@app.command()
def plan(
    recipe: Annotated[
        str | None,
        typer.Argument(help="A shipped recipe's name, or a YAML file.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    cache: Annotated[
        bool, typer.Option("--cache", help="Only the size of the key/value cache.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help="With --cache: a model, or its config.json; else the recipe's target."),
    ] = None,
    context: Annotated[
        list[str] | None, typer.Option(help="Tokens, several with commas; else the model's own.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences (1).")] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="bf16, fp8, k4v4, fitted:3.5, …; several with commas."),
    ] = None,
    sinks: Annotated[
        int | None, typer.Option(min=0, help="First tokens kept in 16 bits (the recipe's, or 0).")
    ] = None,
    recent: Annotated[
        int | None, typer.Option(min=0, help="Last tokens kept in 16 bits (the recipe's, or 0).")
    ] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Write the sizes as JSON too.")
    ] = None,
) -> None:
    """Print what would run, what is reused and why, with estimates; --cache: the cache's size."""
    given = (model, context, batch, formats, sinks, recent, json_out)
    if not cache and any(option is not None for option in given):
        raise ConfigError(
            "plan: expected --cache beside --model, --context, --batch, --format, --sinks, "
            "--recent or --json, found none. Add --cache"
        )
    if cache:
        if (recipe is None) == (model is None):
            raise ConfigError(
                "plan --cache: expected a recipe or --model, found "
                f"{'neither' if model is None else 'both'}. "
                "Write plan RECIPE --cache, or plan --cache --model MODEL"
            )
        config = None if recipe is None else _recipe(recipe, overrides)
        _plan_cache(config, model, context, formats, (batch or 1, sinks, recent), json_out)
        return
    if recipe is None:
        raise ConfigError(
            "plan: expected a recipe, found none. Write plan RECIPE, or plan --cache --model MODEL"
        )
    _plan_run(_recipe(recipe, overrides))


def _plan_run(config: "RecipeConfig") -> None:
    from stillhouse.cli.tables import show_plan, show_target_cache
    from stillhouse.pipelines.cache_planning import plan_target_cache
    from stillhouse.pipelines.local import local_runner
    from stillhouse.pipelines.planning import plan_run

    show_plan(plan_run(local_runner(config)))
    try:
        show_target_cache(plan_target_cache(config))
    except StillhouseError as error:  # the stages' plan is none the worse
        print(f"cache of the target: not known. {error}")


def _plan_cache(
    config: "RecipeConfig | None",
    model: str | None,
    context: list[str] | None,
    formats: list[str] | None,
    numbers: tuple[int, int | None, int | None],
    out: Path | None,
) -> None:
    from stillhouse.cli.tables import show_cache
    from stillhouse.pipelines.cache_planning import (
        ask_cache,
        plan_cache,
        write_cache_plan,
    )

    ref = model if config is None else config.models.target
    found = plan_cache(ref or "", ask_cache(config, context or (), formats or (), *numbers))
    show_cache(found)
    if out is not None:
        write_cache_plan(found, out)


@app.command()
def status(run: RunArgument) -> None:
    """Print how far a run is, and who runs it."""
    from stillhouse.cli.tables import show_status
    from stillhouse.pipelines.planning import read_status

    show_status(read_status(find_run(run)))


@app.command()
def report(run: RunArgument) -> None:
    """Print a run's result table."""
    from stillhouse.cli.tables import show_report
    from stillhouse.pipelines.last_start import read_keys

    folder = find_run(run)
    if not folder.report.is_file():
        raise ConfigError(f"{folder.report}: no report yet; the run is not finished")
    try:
        found = json.loads(folder.report.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"{folder.report}: expected JSON, found {error}; run the recipe again to write it anew"
        ) from error
    show_report(found, folder.root)
    if found.get("keys") != read_keys(folder):
        print(
            "stillhouse: this result is of an earlier start; the last one, with other settings, "
            f"models or data, is not finished: stillhouse status {run}",
            file=sys.stderr,
        )


@app.command()
def query(
    run: RunArgument,
    sql: Annotated[str, typer.Argument(help="One SELECT over the run's tables.")],
    limit: Annotated[int, typer.Option(min=1, help="Rows printed at most.")] = 100,
) -> None:
    """Query a run's tables with SQL, read-only."""
    from stillhouse.cli.tables import show_rows

    with open_catalog(run) as catalog:
        names, rows = catalog.query(sql)
        show_rows(names, rows, limit)


@app.command()
def trace(
    run: RunArgument,
    identity: Annotated[str, typer.Argument(metavar="ID", help="A prompt's or answer's id.")],
) -> None:
    """Print a prompt's whole way through the line."""
    from stillhouse.cli.tables import show_trace

    with open_catalog(run) as catalog:
        show_trace(catalog.trace(identity))


@app.command()
def doctor(
    recipe: Annotated[str, typer.Argument(help="The recipe to check for.")] = "demo",
) -> None:
    """Check this machine: packages, models, space, threads."""
    from stillhouse.cli.tables import show_checks
    from stillhouse.pipelines.diagnosis import diagnose

    if not show_checks(diagnose(_recipe(recipe, None))):
        raise typer.Exit(1)


def _recipe(name: str, overrides: list[str] | None) -> "RecipeConfig":
    from stillhouse.configs.load import load_recipe

    return load_recipe(name, overrides or ())


def main() -> None:
    """Run the command line; an error of ours is one message and its exit code."""
    try:
        app()
    except StillhouseError as error:
        print(f"stillhouse: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
