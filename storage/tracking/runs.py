"""The runs that one run folder has on a server: found by their tags, else made."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from stillhouse.errors import TrackingError
from stillhouse.storage.events import Event
from stillhouse.storage.redaction import redact_uris
from stillhouse.storage.tracking.database import sqlite_path
from stillhouse.storage.tracking.state import TrackingState

if TYPE_CHECKING:
    from mlflow import MlflowClient

ID_TAG = "stillhouse.id"


class RunStore:
    """One experiment's runs of ours: the parent, and a child for each stage key."""

    def __init__(
        self, client: "MlflowClient", uri: str, experiment: str, run_name: str, state: Path
    ) -> None:
        """Find or make the experiment. `state` is the file of the ids that the server gave.

        Raises TrackingError when the experiment has been deleted.
        """
        self._client, self._uri, self._run_name = client, uri, run_name
        self._path, self.state = state, TrackingState.load(state)
        self.experiment = self._experiment_id(experiment)

    def save(self) -> None:
        """Write down what `state` holds by now."""
        self.state.save(self._path)

    def parent(self, event: Event) -> str:
        """Return the id of the run folder's run."""
        if self.state.parent is None:
            self.state.parent = self._find_or_create(self.state.identity, self._run_name, event, {})
            self.save()
        return self.state.parent

    def start_stage(self, stage: str, key: str) -> None:
        """From now on the stage's run is the one of `key`."""
        self.state.current[stage] = key
        self.save()

    def of(self, event: Event) -> str:
        """Return the child run of the event's stage, or the parent when it has none."""
        key = self.state.current.get(event.stage or "")
        if event.stage is None or key is None:
            return self.parent(event)
        name = f"{event.stage}/{key}"
        if name not in self.state.children:
            tags = {"mlflow.parentRunId": self.parent(event), "stillhouse.key": key}
            identity = f"{self.state.identity}/{name}"
            self.state.children[name] = self._find_or_create(identity, event.stage, event, tags)
            self.save()
        return self.state.children[name]

    def _experiment_id(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            return str(self._client.create_experiment(name, self._artifact_location(name)))
        if found.lifecycle_stage != "active":
            raise TrackingError(
                f"the experiment {name!r} has been deleted on {redact_uris(self._uri)}. Restore it "
                f"(`mlflow experiments restore -x {found.experiment_id}`) or name another one."
            )
        return str(found.experiment_id)

    def _artifact_location(self, name: str) -> str | None:
        """A server knows where its artifacts go; beside a database file it is for us to say."""
        database = sqlite_path(self._uri)
        if database is None:
            return None
        place = hashlib.sha256(name.encode()).hexdigest()[:12]
        return (database.parent / "mlartifacts" / place).as_uri()

    def _find_or_create(
        self, identity: str, name: str, event: Event, tags: Mapping[str, str]
    ) -> str:
        wanted = f"tags.`{ID_TAG}` = '{identity}'"
        found = self._client.search_runs([self.experiment], wanted, max_results=1)
        if found:
            return str(found[0].info.run_id)
        run = self._client.create_run(
            self.experiment, event.time, {ID_TAG: identity, **tags}, run_name=name
        )
        return str(run.info.run_id)
