"""What a stage tells its user to look at next."""

from stillhouse.pipelines.stage_run import StageRun


def query_hint(run: StageRun, sql: str) -> str:
    """A command that shows rows of this run."""
    return f'`stillhouse query {run.folder.root} "{sql}"`'


def malformed_note(run: StageRun, count: int, locator: str, reason: str, table: str) -> str:
    """How many rows of a source were set aside, the first of them, and where all are."""
    sql = f"SELECT reason FROM {table} WHERE status = 'failed'"
    rows = "1 malformed row was" if count == 1 else f"{count} malformed rows were"
    return (
        f"{run.stage}: {rows} set aside, the first at {locator} ({reason}); all of them: "
        f"{query_hint(run, sql)}"
    )
