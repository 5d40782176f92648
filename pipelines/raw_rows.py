"""From rows as read or proposed to prompts: shared by `ingest` and each round of `expand`."""

from collections.abc import Sequence
from dataclasses import replace

from stillhouse.pipelines.stage_run import StageRun
from stillhouse.pipelines.text import split_of
from stillhouse.storage.manifest import Counts
from stillhouse.storage.records import PromptRecord, RawRecord, Role, content_id


def mark_too_long(run: StageRun, rows: Sequence[RawRecord]) -> list[RawRecord]:
    """Reject rows that are too long for the base's or the target's tokenizer."""
    limit = run.recipe.data.max_prompt_tokens
    texts = [row.rendered for row in rows]
    refs = dict.fromkeys((run.recipe.models.base, run.recipe.models.target))
    lengths = [run.workers.count_tokens(ref, texts) for ref in refs]
    longest = [max(counts) for counts in zip(*lengths, strict=True)]
    return [
        _too_long(row, tokens, limit) if row.status == "kept" and tokens > limit else row
        for row, tokens in zip(rows, longest, strict=True)
    ]


def _too_long(row: RawRecord, tokens: int, limit: int) -> RawRecord:
    return replace(row, status="rejected", reason=f"too_long: {tokens} tokens, limit {limit}")


def prompts_of(rows: Sequence[RawRecord], round_: int, heldout_percent: int) -> list[PromptRecord]:
    """The prompts of judged rows. A row that is no prompt gets an id from where it came from."""
    return [
        PromptRecord(
            prompt_id=content_id("prompt", row.text if row.status == "kept" else row.locator),
            text=row.text,
            rendered=row.rendered,
            origin=row.origin,
            role=_role(row),
            split=split_of(row.text, heldout_percent),
            round=round_,
            parent_id=row.parent_id,
            locator=row.locator,
            status=row.status,
            reason=row.reason,
        )
        for row in rows
    ]


def _role(row: RawRecord) -> Role:
    if row.kind == "question":
        raise ValueError(f"{row.locator}: expected a prompt, found a question")
    return row.kind


def raw_counts(rows: Sequence[RawRecord]) -> Counts:
    """Account for judged rows."""
    statuses = [row.status for row in rows]
    return Counts(
        rows_in=len(rows),
        kept=statuses.count("kept"),
        rejected=statuses.count("rejected"),
        failed=statuses.count("failed"),
    )
