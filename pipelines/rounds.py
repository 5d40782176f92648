"""What the rounds of `expand` read and report: whom new prompts are made from, and coverage."""

from collections.abc import Sequence
from typing import Any

from stillhouse.pipelines.forms import mine
from stillhouse.pipelines.proposals import Seed
from stillhouse.pipelines.stage_run import StageRun
from stillhouse.storage.records import RoundRecord

MAX_SEEDS = 4096  # drawn anew by each task, so a pool of any size fits

# Of every answer one, then of every answer a second: diverse, however few are drawn.
_SEEDS = """
SELECT prompt_id, text, answer FROM (
    SELECT prompt_id, prompts.text, completions.text AS answer,
        md5(prompt_id || $seed) AS draw,
        row_number() OVER (
            PARTITION BY completions.text ORDER BY md5(prompt_id || $seed), prompt_id) AS turn
    FROM selections JOIN prompts USING (prompt_id) JOIN completions USING (completion_id)
    WHERE selections.status = 'kept' AND prompts.status = 'kept' AND selections.round < $round
        AND split = 'train'
) ORDER BY turn, draw, prompt_id LIMIT $most
"""
_UNSELECTED = """
SELECT text FROM prompts JOIN selections USING (prompt_id)
WHERE prompts.status = 'kept' AND role IN ('pool', 'generated') AND split = 'train'
    AND selections.status <> 'kept' AND prompts.round < $round
ORDER BY md5(prompt_id || $seed), prompt_id LIMIT $most
"""
_YIELD = """
SELECT count(*), count(*) FILTER (prompts.reason = 'duplicate'),
    count(*) FILTER (prompts.status = 'kept'), count(*) FILTER (selections.status = 'kept'),
    quantile_cont(gap, 0.1), quantile_cont(gap, 0.5), quantile_cont(gap, 0.9)
FROM prompts LEFT JOIN selections USING (prompt_id)
WHERE prompts.round = $round AND role <> 'control'
"""
_ANSWERS = """
SELECT count(*), count(DISTINCT text), count(DISTINCT text) - count(DISTINCT text) FILTER (
    selections.round < $round)
FROM selections JOIN completions USING (completion_id)
WHERE selections.status = 'kept' AND selections.round <= $round
"""


def draw_seeds(run: StageRun, round_: int, seed: str) -> list[Seed]:
    """Selected prompts of earlier rounds, of many answers; the same ones for the same seed."""
    parameters = {"round": round_, "seed": seed, "most": MAX_SEEDS}
    with run.catalog() as catalog:
        return [Seed(*row) for row in catalog.rows(_SEEDS, parameters)]


def draw_unselected(run: StageRun, round_: int, seed: str) -> list[str]:
    """Texts of prompts that were not selected: whoever wrote them knew names, too."""
    parameters = {"round": round_, "seed": seed, "most": MAX_SEEDS}
    with run.catalog() as catalog:
        return [text for (text,) in catalog.rows(_UNSELECTED, parameters)]


def round_record(run: StageRun, round_: int) -> RoundRecord:
    """Yield and coverage after a round; round 0 is seeds and pool."""
    with run.catalog() as catalog:
        [counts] = catalog.rows(_YIELD, {"round": round_})
        [answers] = catalog.rows(_ANSWERS, {"round": round_})
    found = mine([seed.text for seed in draw_seeds(run, round_ + 1, "coverage")])
    return _record(round_, counts, answers, (len(found.forms), found.entities))


def _record(
    round_: int, counts: Sequence[Any], answers: Sequence[Any], mined: tuple[int, int]
) -> RoundRecord:
    proposed, duplicates, new, kept, low, median, high = counts
    kept_so_far, distinct, fresh = answers
    return RoundRecord(
        round=round_,
        proposed=proposed,
        duplicates=duplicates,
        new=new,
        kept=kept,
        kept_so_far=kept_so_far,
        gap_p10=low,
        gap_p50=median,
        gap_p90=high,
        answers=distinct,
        new_answers=fresh,
        forms=mined[0],
        entities=mined[1],
    )
