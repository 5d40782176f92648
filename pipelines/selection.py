"""Which scored answers are special, as one query: shared by `select` and each round of `expand`."""

import math
from collections.abc import Iterator

from stillhouse.configs.stages import SelectConfig
from stillhouse.pipelines.stage_run import StageRun
from stillhouse.pipelines.text import chunked
from stillhouse.storage.manifest import Counts
from stillhouse.storage.records import SelectionRecord

# gap = log(PPL_base / PPL_specialist) >= ln(tau) keeps a row (TuneShift-KD, §3). Rows that pass
# compete for the quotas by gap; ties go to the lower id, so the result is the same every time.
JUDGE = """
WITH judged AS (
    SELECT scores.*, completions.text AS answer,
        CASE WHEN finish = 'length' THEN 'truncated'
             WHEN gap < $gap THEN 'below_threshold'
             WHEN confidence < $confidence THEN 'low_confidence' END AS objection
    FROM scores JOIN completions USING (completion_id)
    WHERE scores.status = 'kept' AND scores.round = $round
), per_answer AS (
    SELECT *, row_number() OVER (
        PARTITION BY objection IS NULL, answer ORDER BY gap DESC, completion_id) AS answer_rank
    FROM judged
), quotas AS (
    SELECT * REPLACE (CASE WHEN objection IS NULL AND answer_rank > $per_answer
        THEN 'over_answer_quota' ELSE objection END AS objection)
    FROM per_answer
), ranked AS (
    SELECT *, row_number() OVER (
        PARTITION BY objection IS NULL ORDER BY gap DESC, completion_id) AS place
    FROM quotas
)
SELECT completion_id, prompt_id, round, gap, confidence,
    CASE WHEN objection IS NULL AND place <= $budget THEN 'kept' ELSE 'rejected' END AS status,
    CASE WHEN objection IS NULL AND place > $budget THEN 'over_budget' ELSE objection END AS reason
FROM ranked ORDER BY completion_id
"""
NO_LIMIT = 2**62


def judge(run: StageRun, round_: int) -> Iterator[list[SelectionRecord]]:
    """Yield the verdicts on one round's scores, in shards; the budget is for the pool (round 0)."""
    config: SelectConfig = run.recipe.select
    parameters = {
        "gap": math.log(config.tau),
        "confidence": -math.inf if config.min_confidence is None else config.min_confidence,
        "round": round_,
        "per_answer": config.max_per_answer or NO_LIMIT,
        "budget": (config.budget if round_ == 0 else None) or NO_LIMIT,
    }
    size = run.recipe.data.shard_rows
    with run.catalog() as catalog:
        yield from chunked(catalog.records(JUDGE, SelectionRecord, size, parameters), size)


def selection_counts(rows: list[SelectionRecord]) -> Counts:
    """Account for verdicts."""
    kept = sum(row.status == "kept" for row in rows)
    return Counts(rows_in=len(rows), kept=kept, rejected=len(rows) - kept)
