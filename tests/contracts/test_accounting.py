"""Guarantee 15 of README.md: in == kept + rejected + failed, recounted from the tables by SQL."""

from collections.abc import Iterator

import pytest

from stillhouse.storage.catalog import Catalog
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.manifest import Counts, Manifest
from tests.contracts.tiny_run import STAGES, keys_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# For each stage: what came in, counted in the tables of the stages before it, and what became of
# it, counted in its own. `expand` asks three times of one proposal; the last answer counts.
IN = {
    "ingest": "SELECT count(*) FROM raw WHERE _stage = 'ingest'",
    "score": "SELECT count(*) FROM prompts WHERE _stage = 'ingest' AND status = 'kept'",
    "select": "SELECT count(*) FROM scores WHERE _stage = 'score' AND status = 'kept'",
    "expand": "SELECT count(*) FROM raw WHERE _stage = 'expand'",
    "curate": "SELECT count(*) FROM selections WHERE status = 'kept'",
    "distill": "SELECT count(*) FROM corpus WHERE status = 'kept' AND split = 'train'",
    "evaluate": "SELECT 4 * count(*) FROM questions WHERE status = 'kept'",
    "compress": "SELECT least(count(*), 8) + count(*) FROM questions WHERE status = 'kept'",
    "deploy": "SELECT least(count(*), 8) FROM questions WHERE status = 'kept'",
}
OUT = {
    "ingest": "SELECT status FROM prompts WHERE _stage = 'ingest' "
    "UNION ALL SELECT status FROM questions",
    "specialize": "SELECT status FROM examples WHERE stage = 'specialize'",
    "score": "SELECT status FROM scores WHERE _stage = 'score'",
    "select": "SELECT status FROM selections WHERE _stage = 'select'",
    "expand": "SELECT coalesce(selections.status, scores.status, prompts.status) AS status "
    "FROM prompts LEFT JOIN scores ON scores.prompt_id = prompts.prompt_id "
    "LEFT JOIN selections ON selections.prompt_id = prompts.prompt_id "
    "WHERE prompts._stage = 'expand'",
    "curate": "SELECT status FROM corpus",
    "distill": "SELECT status FROM examples WHERE stage = 'distill'",
    "evaluate": "SELECT status FROM evaluations WHERE _stage = 'evaluate'",
    "compress": "SELECT status FROM cache_measures "
    "UNION ALL SELECT status FROM evaluations WHERE _stage = 'compress'",
    "deploy": "SELECT status FROM deployments",
}
COUNT = """
SELECT count(*), count(*) FILTER (status = 'kept'), count(*) FILTER (status = 'rejected'),
    count(*) FILTER (status = 'failed') FROM ({})
"""


@pytest.fixture(scope="module")
def catalog(clean_run: RunFolder) -> Iterator[Catalog]:
    with Catalog(clean_run, Manifest(clean_run), keys_of(clean_run)) as opened:
        yield opened


def manifest_counts(folder: RunFolder, stage: str) -> Counts:
    entry = Manifest(folder).stage(stage, keys_of(folder)[stage])
    assert entry is not None
    return entry.counts


@pytest.mark.parametrize("stage", STAGES)
def test_every_row_is_kept_rejected_or_failed(
    catalog: Catalog, clean_run: RunFolder, stage: str
) -> None:
    [row] = catalog.rows(COUNT.format(OUT[stage]))
    counts = Counts(*row)
    assert counts.rows_in == counts.kept + counts.rejected + counts.failed
    assert counts == manifest_counts(clean_run, stage)
    assert counts.kept > 0


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage in IN])
def test_what_one_stage_keeps_is_what_the_next_takes_in(
    catalog: Catalog, clean_run: RunFolder, stage: str
) -> None:
    [(rows,)] = catalog.rows(IN[stage])
    assert rows == manifest_counts(clean_run, stage).rows_in


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ("prompts", "prompt_id"),
        ("questions", "question_id"),
        ("completions", "completion_id"),
        ("selections", "completion_id"),
        ("corpus", "example_id"),
    ],
)
def test_ids_are_unique_among_what_is_kept(catalog: Catalog, table: str, key: str) -> None:
    status = "" if table == "completions" else "WHERE status = 'kept'"
    [(rows, ids)] = catalog.rows(f"SELECT count(*), count(DISTINCT {key}) FROM {table} {status}")
    assert rows == ids


@pytest.mark.parametrize(
    ("table", "key", "parent"),
    [
        ("completions", "prompt_id", "prompts"),
        ("scores", "prompt_id", "prompts"),
        ("selections", "completion_id", "completions"),
        ("corpus", "completion_id", "completions"),
        ("evaluations", "question_id", "questions"),
        ("deployments", "question_id", "questions"),
    ],
)
def test_every_row_has_its_parent(catalog: Catalog, table: str, key: str, parent: str) -> None:
    orphans = f"SELECT count(*) FROM {table} ANTI JOIN {parent} USING ({key})"
    assert catalog.rows(orphans) == [(0,)]


@pytest.mark.parametrize("table", ["prompts", "scores", "selections", "corpus", "evaluations"])
def test_a_reason_for_all_that_leaves_and_none_for_what_stays(catalog: Catalog, table: str) -> None:
    wrong = f"SELECT count(*) FROM {table} WHERE (status = 'kept') <> (reason IS NULL)"
    assert catalog.rows(wrong) == [(0,)]
