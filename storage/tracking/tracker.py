"""From a run's event log to one server: which events are due, and what its answers mean."""

import hashlib
from collections.abc import Iterator

from stillhouse.errors import TrackingError
from stillhouse.storage.events import Event, EventLog
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.redaction import redact_uris
from stillhouse.storage.tracking.database import created_by_one
from stillhouse.storage.tracking.fields import MAX_METRICS
from stillhouse.storage.tracking.reachability import is_disconnection, why_unreachable
from stillhouse.storage.tracking.settings import mlflow_quiet
from stillhouse.storage.tracking.upload import Upload


class Tracker:
    """Uploads a run's events to one server, each once, in order."""

    def __init__(
        self, folder: RunFolder, log: EventLog, uri: str, experiment: str, run_name: str
    ) -> None:
        """Remember where to upload to; connects to nothing and imports nothing."""
        self._folder, self._log, self._uri = folder, log, uri
        self._experiment, self._run_name = experiment, run_name
        # Another server or experiment has been told nothing yet, so it has a cursor of its own.
        target = hashlib.sha256(f"{uri}\n{experiment}".encode()).hexdigest()
        self._cursor = f"mlflow-{target[:12]}"
        self._upload: Upload | None = None

    def probe(self) -> str | None:
        """Return None when the server answers, else why not, in words; takes seconds."""
        return why_unreachable(self._uri)

    def is_behind(self) -> bool:
        """Say whether there are events that the server was not told."""
        return next(self._log.pending(self._cursor), None) is not None

    def flush(self) -> int:
        """Upload what is pending and return how many events that was.

        With the server out of reach the rest stays in the event log for the next call. Raises
        TrackingError when the server is there and refuses; nothing is lost then either.
        """
        if not self.is_behind() or self.probe() is not None:
            return 0
        taken = 0
        for batch in _batches(self._log.pending(self._cursor)):
            if not self._send(batch):
                break
            self._log.acknowledge(self._cursor, batch[-1].id)
            taken += len(batch)
        return taken

    def _send(self, batch: list[Event]) -> bool:
        """Upload one batch; False when the server went away meanwhile."""
        with mlflow_quiet():
            from mlflow.exceptions import MlflowException
            from sqlalchemy.exc import SQLAlchemyError

            try:
                self._session().take(batch)
            except (MlflowException, SQLAlchemyError, OSError) as error:
                if is_disconnection(error) or self.probe() is not None:
                    return False
                raise TrackingError(self._refusal(batch[0], error)) from error
        return True

    def _refusal(self, event: Event, error: Exception) -> str:
        return (
            f"the tracking server {redact_uris(self._uri)} refused event {event.id} "
            f"({event.kind}, stage {event.stage}): {redact_uris(str(error))}. "
            "Nothing is lost: the event and those after it stay in events.jsonl and are "
            "uploaded by the next start once the server takes them."
        )

    def _session(self) -> Upload:
        if self._upload is None:
            state = self._folder.tracking / f"{self._cursor}.runs.json"
            with created_by_one(self._uri):
                self._upload = Upload(
                    self._folder, self._uri, self._experiment, self._run_name, state
                )
        return self._upload


def _batches(events: Iterator[Event]) -> Iterator[list[Event]]:
    """Yield neighbouring metrics together, a bounded number at a time, and the rest one by one."""
    metrics: list[Event] = []
    for event in events:
        if metrics and (event.kind != "metric" or len(metrics) == MAX_METRICS):
            yield metrics
            metrics = []
        if event.kind == "metric":
            metrics.append(event)
        else:
            yield [event]
    if metrics:
        yield metrics
