"""Which scored answers are special, as one query: shared by `select` and each round of `expand`.

An answer passes every criterion or leaves with the first one's reason (`low_gap`, …); what passes
competes for quotas and budget. Ties go to the lower id, so the result is the same every time.
Controls calibrate bounds and are never kept; one that would have been leaves as `control`.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from stillhouse.configs.select import CriterionConfig, SelectConfig
from stillhouse.errors import SourceError
from stillhouse.pipelines.signals import measured
from stillhouse.pipelines.stage_run import StageRun
from stillhouse.pipelines.text import chunked
from stillhouse.storage.manifest import Counts
from stillhouse.storage.records import SelectionRecord

if TYPE_CHECKING:
    from stillhouse.storage.catalog import Catalog

NO_LIMIT = 2**62

# One row an answer of the round; seeds and controls come along in every round, to compare with.
ANSWERED = """
WITH answered AS (
    SELECT scores.*, completions.text AS answer, finish, role, prompts.text AS prompt_text,
        len(token_ids) AS tokens, target_scores.confidence AS target_confidence
    FROM scores JOIN completions USING (completion_id)
    JOIN prompts ON prompts.prompt_id = scores.prompt_id AND prompts.status = 'kept'
    LEFT JOIN target_scores ON target_scores.completion_id = scores.completion_id
    WHERE scores.status = 'kept' AND (scores.round = $round OR role IN ('seed', 'control'))
)"""
# MinHash with one permutation (Broder 1997): prompts share a bucket with a probability that is the
# Jaccard index of their words.
_BUCKET = """list_min(list_transform(
    list_distinct(string_split(lower(prompt_text), ' ')), lambda word: md5_number_lower(word)))"""
_RANKED = """, judged AS (
    SELECT measured.*, {bucket} AS bucket, CASE
        WHEN finish = 'length' THEN 'truncated'
        WHEN role = 'seed' THEN NULL{objections}
        WHEN role = 'control' THEN 'control' END AS objection
    FROM measured CROSS JOIN bounds WHERE round = $round
), per_answer AS (
    SELECT *, row_number() OVER (PARTITION BY objection IS NULL, answer ORDER BY {order}) AS nth
    FROM judged
), one_quota AS (
    SELECT * REPLACE (CASE WHEN objection IS NULL AND nth > $per_answer
        THEN 'over_answer_quota' ELSE objection END AS objection) FROM per_answer
), per_cluster AS (
    SELECT *, row_number() OVER (PARTITION BY objection IS NULL, bucket ORDER BY {order}) AS nth2
    FROM one_quota
), quotas AS (
    SELECT * REPLACE (CASE WHEN objection IS NULL AND nth2 > $per_cluster
        THEN 'over_cluster_quota' ELSE objection END AS objection) FROM per_cluster
), ranked AS (
    SELECT *, row_number() OVER kept_first AS place,
        sum(tokens + prompt_tokens) OVER (kept_first ROWS UNBOUNDED PRECEDING) AS spent
    FROM quotas WINDOW kept_first AS (PARTITION BY objection IS NULL ORDER BY {order})
), told AS (
    SELECT *, CASE WHEN objection IS NULL AND (place > $budget OR spent > $budget_tokens)
        THEN 'over_budget' ELSE objection END AS verdict FROM ranked
)
SELECT completion_id, prompt_id, round, gap, confidence,
    CASE WHEN verdict IS NULL THEN 'kept' ELSE 'rejected' END AS status, verdict AS reason
FROM told ORDER BY completion_id
"""


def judge(run: StageRun, round_: int) -> Iterator[list[SelectionRecord]]:
    """Yield the verdicts on one round's scores, in shards; the budget is for round 0.

    Raises SourceError where a criterion is calibrated and no control has an answer.
    """
    config, size = run.recipe.select, run.recipe.data.shard_rows
    budgets = (config.budget, config.budget_tokens) if round_ == 0 else (None, None)
    limits = {
        "per_answer": config.max_per_answer or NO_LIMIT,
        "per_cluster": config.max_per_cluster or NO_LIMIT,
        "budget": budgets[0] or NO_LIMIT,
        "budget_tokens": budgets[1] or NO_LIMIT,
    }
    with run.catalog() as catalog:
        _require_controls(catalog, config)
        parameters = limits | _parameters(config, round_)
        rows = catalog.records(_query(config), SelectionRecord, size, parameters)
        yield from chunked(rows, size)


def bounds(run: StageRun) -> list[dict[str, Any]]:
    """What each criterion asks of round 0: signal and bound, and what share of controls passes."""
    config = run.recipe.select
    criteria = config.all_criteria()
    if not criteria:
        return []
    passes = ", ".join(
        f"any_value(bound_{place}), avg(({_passes(place, item)})::DOUBLE) "
        "FILTER (role = 'control' AND finish <> 'length')"
        for place, item in enumerate(criteria)
    )
    sql = f"{_tables(config)} SELECT {passes} FROM measured CROSS JOIN bounds"
    with run.catalog() as catalog:
        [row] = catalog.rows(sql, _parameters(config, 0))
    return [
        {"signal": item.signal, "bound": row[2 * place], "controls_passed": row[2 * place + 1]}
        for place, item in enumerate(criteria)
    ]


def selection_counts(rows: list[SelectionRecord]) -> Counts:
    """Account for verdicts."""
    kept = sum(row.status == "kept" for row in rows)
    return Counts(rows_in=len(rows), kept=kept, rejected=len(rows) - kept)


def _query(config: SelectConfig) -> str:
    objections = "".join(
        f"\n        WHEN signal_{item.signal} IS NULL THEN 'unmeasured_{item.signal}'"
        f"\n        WHEN NOT coalesce({_passes(place, item)}, false) THEN 'low_{item.signal}'"
        for place, item in enumerate(config.all_criteria())
    )
    order = f"role = 'seed' DESC, signal_{config.order} DESC NULLS LAST, completion_id"
    return _tables(config) + _RANKED.format(objections=objections, order=order, bucket=_BUCKET)


def _tables(config: SelectConfig) -> str:
    """`measured`, and `bounds`: one row with a column a criterion."""
    criteria = config.all_criteria()
    columns = [f"{_bound(item)} AS bound_{place}" for place, item in enumerate(criteria)]
    listed = ", ".join(["count(*)", *columns])  # an aggregate whatever is asked: one row
    return f"{ANSWERED}{measured(config.signals())}, bounds AS (SELECT {listed} FROM measured)"


def _bound(item: CriterionConfig) -> str:
    signal = f"signal_{item.signal}"
    if item.at_least is not None:
        return f"max({item.at_least!r}::DOUBLE)"
    if item.quantile is not None:
        mine = "round = $round AND role IN ('pool', 'generated') AND finish <> 'length'"
        return f"quantile_cont({signal}, {item.quantile!r}) FILTER ({mine})"
    theirs = f"FILTER (role = 'control' AND finish <> 'length' AND {signal} IS NOT NULL)"
    # The first of them, from above, that may not pass where so many may.
    first = f"1 + floor({item.controls!r} * count(*) {theirs})::BIGINT"
    return f"(list({signal} ORDER BY {signal} DESC) {theirs})[{first}]"


def _passes(place: int, item: CriterionConfig) -> str:
    compare = ">" if item.controls is not None else ">="
    return f"signal_{item.signal} {compare} bound_{place}"


def _parameters(config: SelectConfig, round_: int) -> dict[str, Any]:
    seed = {"seed": str(config.seed)} if "random" in config.signals() else {}
    return {"round": round_, **seed}


def _require_controls(catalog: "Catalog", config: SelectConfig) -> None:
    asking = [item.signal for item in config.all_criteria() if item.controls is not None]
    if not asking:
        return
    [(found,)] = catalog.rows(
        "SELECT count(*) FROM scores JOIN prompts USING (prompt_id) "
        "JOIN completions USING (completion_id) WHERE scores.status = 'kept' "
        "AND prompts.status = 'kept' AND role = 'control' AND finish <> 'length'"
    )
    if not found:
        raise SourceError(
            f"select.criteria: {asking[0]} is calibrated against controls, and no control prompt "
            "has a whole answer of the specialist's; bring other prompts under data.controls"
        )
