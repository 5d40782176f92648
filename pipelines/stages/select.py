"""Keep what is special: the gap against its threshold, then quotas and the budget."""

from collections.abc import Iterator, Sequence
from typing import ClassVar

from stillhouse.errors import SourceError
from stillhouse.pipelines.hints import query_hint
from stillhouse.pipelines.selection import bounds, judge, selection_counts
from stillhouse.pipelines.stage import Outcome, Part, Stage, Task
from stillhouse.pipelines.stage_run import StageRun


class SelectStage(Stage):
    """`selections`: a verdict and its reason for every scored answer."""

    name: ClassVar[str] = "select"
    version: ClassVar[int] = 2
    after: ClassVar[tuple[str, ...]] = ("ingest", "score")

    def waves(self, run: StageRun) -> Iterator[Sequence[Task]]:
        yield [Task("pool")]

    def work(self, task: Task, run: StageRun) -> Iterator[Part]:
        for part, rows in enumerate(judge(run, 0)):
            yield Part({"selections": rows}, selection_counts(rows), part=part)

    def rows_due(self, run: StageRun) -> int:
        return run.kept("score")

    def finish(self, run: StageRun) -> Outcome:
        with run.catalog() as catalog:
            rows = catalog.rows(
                # An answer that cannot be scored is rejected too: it has no row in `selections`.
                "SELECT origin, count(*), "
                "count(*) FILTER ('rejected' IN (scores.status, selections.status) "
                "AND selections.reason IS DISTINCT FROM 'control') "
                "FROM prompts JOIN scores USING (prompt_id) LEFT JOIN selections "
                "ON selections.completion_id = scores.completion_id "
                "WHERE prompts.status = 'kept' GROUP BY origin ORDER BY origin"
            )
            reasons = catalog.rows(
                "SELECT reason, count(*) FROM selections GROUP BY reason ORDER BY 2 DESC, 1"
            )
        if None not in dict(reasons):
            found = (
                ", ".join(f"{count} {reason}" for reason, count in reasons) or "no scored answer"
            )
            raise SourceError(
                "select: expected at least one answer that the specialist is surer of than its "
                f"base (select.tau, select.criteria), found {found}; look at "
                + query_hint(
                    run, "SELECT gap, confidence, reason FROM selections ORDER BY gap DESC"
                )
            )
        origins = {
            origin: {"rows": count, "rejected": rejected, "reject_rate": rejected / count}
            for origin, count, rejected in rows
        }
        return Outcome(facts={"origins": origins, "criteria": bounds(run)})
