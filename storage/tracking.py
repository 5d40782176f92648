"""Tells an MLflow server what happened in a run; the only module that knows MLflow.

One parent run a run folder, one child run a stage key, the student as a registered model. MLflow
is imported by the first upload, never before: a run that has nothing to tell does not load it.

Events are uploaded in order and each is acknowledged after the server took it. A kill between the
two uploads that event again, so every handler can run twice: runs, logged models and versions are
found by a tag before they are made, and MLflow drops metrics and datasets that it already has.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillhouse.errors import TrackingError
from stillhouse.storage.events import Event, EventLog
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.reachability import (
    check_uri,
    is_disconnection,
    sqlite_path,
    why_unreachable,
)
from stillhouse.storage.redaction import redact_uris, redacted
from stillhouse.storage.tracking_fields import (
    MAX_BATCH,
    MAX_METRICS,
    clipped,
    dataset_id,
    digest_of,
    entity_name,
    flattened,
    numbers,
    parts,
    quoted,
    release,
)
from stillhouse.storage.tracking_settings import mlflow_quiet
from stillhouse.storage.tracking_state import TrackingState

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

CANDIDATE, CHAMPION = "candidate", "champion"

_ID_TAG = "stillhouse.id"
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}


def default_uri(runs_root: Path) -> str:
    """Return the URI used when a recipe names none: a database beside the runs, absolute."""
    return f"sqlite:///{runs_root.resolve() / 'mlflow.db'}"


class Tracker:
    """Uploads a run's events to one server, each once, in order."""

    def __init__(
        self, folder: RunFolder, log: EventLog, uri: str, experiment: str, run_name: str
    ) -> None:
        """Remember where to upload to; connects to nothing and imports nothing.

        Raises ConfigError for a URI that MLflow cannot track to.
        """
        check_uri(uri)
        self._folder, self._log, self._uri = folder, log, uri
        self._experiment, self._run_name = experiment, run_name
        # Another server or experiment has been told nothing yet, so it has a cursor of its own.
        target = hashlib.sha256(f"{uri}\n{experiment}".encode()).hexdigest()
        self._cursor = f"mlflow-{target[:12]}"
        self._upload: _Upload | None = None

    def probe(self) -> str | None:
        """Return None when the server answers, else a sentence saying why not; takes seconds."""
        return why_unreachable(self._uri)

    def flush(self) -> int:
        """Upload what is pending and return how many events that was.

        With the server out of reach the rest stays in the event log for the next call. Raises
        TrackingError when the server is there and refuses; nothing is lost then either.
        """
        if next(self._log.pending(self._cursor), None) is None or self.probe() is not None:
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

            try:
                self._session().take(batch)
            except (MlflowException, OSError) as error:
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

    def _session(self) -> "_Upload":
        if self._upload is None:
            state = self._folder.tracking / f"{self._cursor}.runs.json"
            self._upload = _Upload(self._folder, self._uri, self._experiment, self._run_name, state)
        return self._upload


class _Upload:
    """A connection to one server, and one handler a kind of event."""

    def __init__(
        self, folder: RunFolder, uri: str, experiment: str, run_name: str, state: Path
    ) -> None:
        from mlflow import MlflowClient

        self._folder, self._uri, self._run_name = folder, uri, run_name
        self._state_path, self._state = state, TrackingState.load(state)
        self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        self._experiment = self._experiment_id(experiment)
        self._handlers: dict[str, Callable[[Event], None]] = {
            "run_started": self._run_started,
            "stage_started": self._stage_started,
            "dataset": self._dataset,
            "stage_finished": self._stage_finished,
            "artifact": self._artifact,
            "model": self._model,
            "promote": self._promote,
            "run_finished": self._run_finished,
        }

    def take(self, batch: list[Event]) -> None:
        """Upload metrics together or one event of another kind."""
        if batch[0].kind == "metric":
            self._metrics(batch)
        else:
            self._handlers[batch[0].kind](batch[0])

    # Runs

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
        if not self._uri.startswith("sqlite"):
            return None
        root = sqlite_path(self._uri).parent
        root.mkdir(parents=True, exist_ok=True)
        return (root / "mlartifacts" / hashlib.sha256(name.encode()).hexdigest()[:12]).as_uri()

    def _parent(self, event: Event) -> str:
        if self._state.parent is None:
            self._state.parent = self._find_or_create(
                self._state.identity, self._run_name, event, {}
            )
            self._save()
        return self._state.parent

    def _run_of(self, event: Event) -> str:
        """Return the child run of the event's stage, or the parent when it has none."""
        key = self._state.current.get(event.stage or "")
        if event.stage is None or key is None:
            return self._parent(event)
        name = f"{event.stage}/{key}"
        if name not in self._state.children:
            tags = {"mlflow.parentRunId": self._parent(event), "stillhouse.key": key}
            identity = f"{self._state.identity}/{name}"
            self._state.children[name] = self._find_or_create(identity, event.stage, event, tags)
            self._save()
        return self._state.children[name]

    def _find_or_create(
        self, identity: str, name: str, event: Event, tags: Mapping[str, str]
    ) -> str:
        wanted = f"tags.`{_ID_TAG}` = '{identity}'"
        found = self._client.search_runs([self._experiment], wanted, max_results=1)
        if found:
            return str(found[0].info.run_id)
        run = self._client.create_run(
            self._experiment, event.time, {_ID_TAG: identity, **tags}, run_name=name
        )
        return str(run.info.run_id)

    def _save(self) -> None:
        self._state.save(self._state_path)

    # Handlers

    def _run_started(self, event: Event) -> None:
        run = self._parent(event)
        self._client.update_run(run, status="RUNNING")
        self._parameters(run, event.data.get("params") or {})
        self._tags(run, flattened(event.data.get("tags") or {}))

    def _stage_started(self, event: Event) -> None:
        assert event.stage is not None
        self._state.current[event.stage] = event.data["key"]
        self._save()
        run = self._run_of(event)
        self._client.update_run(run, status="RUNNING")
        self._parameters(run, event.data.get("params") or {})

    def _parameters(self, run: str, params: Mapping[str, Any]) -> None:
        """Log parameters; one that a resumed run has changed becomes the tag `changed.<name>`.

        MLflow never lets a parameter change, and the value the run began with stays true of it.
        """
        from mlflow.entities import Param

        wanted = flattened(redacted("", dict(params)))
        known = self._client.get_run(run).data.params
        new = [Param(name, value) for name, value in wanted.items() if name not in known]
        for part in parts(new, MAX_BATCH):
            self._client.log_batch(run, params=part)
        changed = {k: v for k, v in wanted.items() if k in known and known[k] != v}
        self._tags(run, {f"changed.{name}"[:250]: value for name, value in changed.items()})

    def _tags(self, run: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        for part in parts([RunTag(name, value) for name, value in tags.items()], MAX_BATCH):
            self._client.log_batch(run, tags=part)

    def _metrics(self, events: Iterable[Event]) -> None:
        by_run: dict[str, list[tuple[str, float, int, int]]] = {}
        for event in events:
            data = event.data
            point = (data["name"], data["value"], event.time, data.get("step") or 0)
            by_run.setdefault(self._run_of(event), []).append(point)
        for run, points in by_run.items():
            self._points(run, points)

    def _points(self, run: str, points: Iterable[tuple[str, float, int, int]]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(entity_name(name), float(value), time, step)
            for name, value, time, step in points
        ]
        for part in parts(metrics, MAX_METRICS):
            self._client.log_batch(run, metrics=part)

    def _dataset(self, event: Event) -> None:
        """Log a table as its stage's output and the tables it was made from as its inputs."""
        parents = [dataset_id(parent) for parent in event.data.get("parents") or ()]
        known = [self._state.datasets[name] for name in parents if name in self._state.datasets]
        inputs = [self._dataset_input(data, "input") for data in known]
        inputs.append(self._dataset_input(event.data, "output"))
        self._client.log_inputs(self._run_of(event), datasets=inputs)
        self._state.datasets[dataset_id(event.data)] = event.data
        self._save()

    def _dataset_input(self, data: Mapping[str, Any], context: str) -> "DatasetInput":
        from mlflow.entities import Dataset, DatasetInput, InputTag

        parents = [dataset_id(parent) for parent in data.get("parents") or ()]
        profile = {"num_rows": data.get("rows"), "parents": parents, "made_by": data.get("source")}
        dataset = Dataset(
            name=clipped(str(data["name"]), 500),
            digest=digest_of(str(data["digest"])),
            source_type="local",
            source=json.dumps({"uri": str(self._folder.absolute(data["path"]))}),
            profile=json.dumps(profile),
        )
        tags = [InputTag("mlflow.data.context", context)]
        if parents:
            tags.append(InputTag("stillhouse.parents", clipped(", ".join(parents), 500)))
        return DatasetInput(dataset, tags)

    def _stage_finished(self, event: Event) -> None:
        data = event.data
        run = self._run_of(event)
        values = {**(data.get("counts") or {}), "seconds": data.get("seconds")}
        values["tokens"] = data.get("tokens")
        if data.get("tokens") and data.get("seconds"):
            values["tokens_per_second"] = data["tokens"] / data["seconds"]
        self._values(run, values, event)
        self._client.set_terminated(run, _STATUS[data["status"]], event.time)

    def _run_finished(self, event: Event) -> None:
        run = self._parent(event)
        self._values(run, event.data.get("metrics") or {}, event)
        self._client.set_terminated(run, _STATUS[event.data["status"]], event.time)

    def _values(self, run: str, values: Mapping[str, Any], event: Event) -> None:
        self._points(run, [(k, v, event.time, 0) for k, v in numbers(values).items()])

    def _artifact(self, event: Event) -> None:
        path = self._folder.absolute(event.data["path"])
        if path.is_dir():
            self._client.log_artifacts(self._run_of(event), str(path), path.name)
        else:
            self._client.log_artifact(self._run_of(event), str(path))

    # The registered model

    def _model(self, event: Event) -> None:
        """Register a checkpoint folder as a new version with the alias `candidate`."""
        name = str(event.data["name"])
        identity = f"{self._state.identity}/{event.data.get('digest') or event.id}"
        model_id = self._logged_model(identity) or self._log_model(identity, event)
        registered = self._version(identity, name, model_id, event)
        self._client.set_registered_model_alias(name, CANDIDATE, registered)
        self._state.versions[name] = registered
        self._save()

    def _logged_model(self, identity: str) -> str | None:
        """Return the id of the model this event has logged; half-uploaded ones are deleted."""
        wanted = f"tags.`{_ID_TAG}` = '{identity}'"
        for model in self._client.search_logged_models([self._experiment], wanted):
            if str(model.status) == "READY":
                return str(model.model_id)
            self._client.delete_logged_model(model.model_id)
        return None

    def _log_model(self, identity: str, event: Event) -> str:
        """Upload a checkpoint folder as it lies there; no weights are loaded."""
        import mlflow
        import mlflow.transformers

        mlflow.set_tracking_uri(self._uri)
        mlflow.set_registry_uri(self._uri)
        run = self._run_of(event)
        with mlflow.start_run(run_id=run):
            logged = mlflow.transformers.log_model(
                str(self._folder.absolute(event.data["path"])),
                name=entity_name(str(event.data["name"])).replace("/", "_"),
                task=event.data.get("task") or "text-generation",
                # named, because inferring them would load the model
                pip_requirements=[f"{p}=={release(p)}" for p in ("torch", "transformers")],
                tags={_ID_TAG: identity},
            )
        self._client.update_run(run, status="RUNNING")  # leaving the block ended it
        return str(logged.model_id)

    def _version(self, identity: str, name: str, model_id: str, event: Event) -> str:
        if not self._client.search_registered_models(f"name = {quoted(name)}"):
            self._client.create_registered_model(name)
        wanted = f"name = {quoted(name)} and tags.`{_ID_TAG}` = '{identity}'"
        for found in self._client.search_model_versions(wanted):
            return str(found.version)
        tags = {_ID_TAG: identity, **flattened(event.data.get("tags") or {})}
        made = self._client.create_model_version(
            name, f"models:/{model_id}", self._run_of(event), tags, model_id=model_id
        )
        return str(made.version)

    def _promote(self, event: Event) -> None:
        """Move `champion` to the version this run registered, whatever `candidate` is by now."""
        name = str(event.data["name"])
        registered = self._state.versions.get(name)
        if registered is None:
            raise TrackingError(
                f"event {event.id} promotes the model {name!r}, which this run has not registered "
                f"(registered: {sorted(self._state.versions) or 'none'})."
            )
        self._client.set_registered_model_alias(name, CHAMPION, registered)


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
