"""What a run's event log already tells, so that a start can add what a kill left out."""

from dataclasses import dataclass
from typing import Self

from stillhouse.storage.events import EventLog


@dataclass(frozen=True, slots=True)
class LoggedEvents:
    """The stages whose end is told, by name and key, and the report that was told last."""

    stages: frozenset[tuple[str, str]]
    report: str | None  # digest; None where the run started again since

    @classmethod
    def read(cls, log: EventLog) -> Self:
        """Read the log once. A stage that started anew under its key is not told any more."""
        stages: set[tuple[str, str]] = set()
        report: str | None = None
        for event in log.read():
            stage = (event.stage or "", str(event.data.get("key")))
            match event.kind:
                case "stage_started":
                    stages.discard(stage)
                case "stage_finished" if event.data["status"] == "finished":
                    stages.add(stage)
                case "run_started":
                    report = None
                case "run_finished":
                    report = event.data.get("report")
        return cls(frozenset(stages), report)
