"""One datum's way through the line, told by the rows that the stages wrote about it."""

from collections.abc import Callable, Sequence
from typing import Any

from stillhouse.errors import ConfigError

Step = tuple[str, dict[str, Any]]
Lookup = Callable[[str, Sequence[object]], list[dict[str, Any]]]

# The line's order; each table with the column by which it knows a prompt or a question.
_OF_PROMPT = (
    ("completions", "prompt_id"),
    ("scores", "prompt_id"),
    ("target_scores", "prompt_id"),
    ("selections", "prompt_id"),
    ("corpus", "prompt_id"),
)
# A private pair is an example without a prompt.
_OF_EXAMPLE_OR_QUESTION = (
    ("examples", "example_id"),
    ("questions", "question_id"),
    ("evaluations", "question_id"),
    ("cache_measures", "text_id"),
    ("deployments", "question_id"),
)
# Where an id that is not a prompt's may be found, and the prompt it belongs to.
_ALIASES = (("completions", "completion_id"), ("corpus", "example_id"))


def trace(lookup: Lookup, identity: str) -> list[Step]:
    """Return every row about `identity`: a prompt, completion, example or question id.

    A prompt made by a generator is preceded by the prompts it was made from. `lookup` runs SQL
    and returns rows by column name. Raises ConfigError when no table knows the id.
    """
    prompt_id = _prompt_of(lookup, identity)
    steps = _ancestors(lookup, prompt_id)
    for table, column in _OF_PROMPT:
        steps += _rows(lookup, table, column, prompt_id)
    examples = dict.fromkeys(row["example_id"] for table, row in steps if table == "corpus")
    for table, column in _OF_EXAMPLE_OR_QUESTION:
        for other in examples or (identity,):
            steps += _rows(lookup, table, column, other)
    if not steps:
        raise ConfigError(
            f"no table of this run knows the id {identity!r}. Expected a prompt, completion, "
            "example or question id, as `stillhouse query RUN 'SELECT prompt_id FROM prompts "
            "LIMIT 5'` prints them."
        )
    return steps


def _prompt_of(lookup: Lookup, identity: str) -> str:
    for table, column in _ALIASES:
        for _, row in _rows(lookup, table, column, identity):
            return str(row["prompt_id"])
    return identity


def _ancestors(lookup: Lookup, prompt_id: str) -> list[Step]:
    """Return the prompt as it was read and as it was kept, its parents' rows before its own."""
    steps: list[Step] = []
    seen: set[str] = set()
    wanted: str | None = prompt_id
    while wanted is not None and wanted not in seen:
        seen.add(wanted)
        rows = _rows(lookup, "prompts", "prompt_id", wanted)
        raw = _rows(lookup, "raw", "locator", rows[0][1]["locator"]) if rows else []
        steps = raw + rows + steps
        wanted = rows[0][1]["parent_id"] if rows else None
    return steps


def _rows(lookup: Lookup, table: str, column: str, value: str) -> list[Step]:
    rows = lookup(f'SELECT * FROM "{table}" WHERE "{column}" = ?', (value,))
    return [(table, row) for row in sorted(rows, key=lambda row: row.get("round") or 0)]
