"""A connection to one server: what each kind of event becomes there."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillhouse.storage.events import Event
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.redaction import redacted
from stillhouse.storage.tracking.fields import (
    MAX_BATCH,
    MAX_METRICS,
    clipped,
    dataset_id,
    digest_of,
    entity_name,
    flattened,
    numbers,
    parts,
)
from stillhouse.storage.tracking.models import ModelStore
from stillhouse.storage.tracking.runs import RunStore

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

_STATUS = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}


class Upload:
    """A connection to one server, and one handler a kind of event."""

    def __init__(
        self, folder: RunFolder, uri: str, experiment: str, run_name: str, state: Path
    ) -> None:
        from mlflow import MlflowClient

        self._folder = folder
        self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        self._runs = RunStore(self._client, uri, experiment, run_name, state)
        self._models = ModelStore(self._client, uri, folder, self._runs)
        self._handlers: dict[str, Callable[[Event], None]] = {
            "run_started": self._run_started,
            "stage_started": self._stage_started,
            "dataset": self._dataset,
            "stage_finished": self._stage_finished,
            "artifact": self._artifact,
            "model": self._models.register,
            "promote": self._models.promote,
            "run_finished": self._run_finished,
        }

    def take(self, batch: list[Event]) -> None:
        """Upload metrics together or one event of another kind."""
        if batch[0].kind == "metric":
            self._metrics(batch)
        else:
            self._handlers[batch[0].kind](batch[0])

    def _run_started(self, event: Event) -> None:
        run = self._runs.parent(event)
        self._client.update_run(run, status="RUNNING")
        self._parameters(run, event.data.get("params") or {})
        self._tags(run, flattened(event.data.get("tags") or {}))

    def _stage_started(self, event: Event) -> None:
        assert event.stage is not None
        self._runs.start_stage(event.stage, event.data["key"])
        run = self._runs.of(event)
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
            by_run.setdefault(self._runs.of(event), []).append(point)
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
        told = self._runs.state.datasets
        inputs = [self._dataset_input(told[name], "input") for name in parents if name in told]
        inputs.append(self._dataset_input(event.data, "output"))
        self._client.log_inputs(self._runs.of(event), datasets=inputs)
        told[dataset_id(event.data)] = event.data
        self._runs.save()

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
        run = self._runs.of(event)
        values = {**(data.get("counts") or {}), "seconds": data.get("seconds")}
        values["tokens"] = data.get("tokens")
        if data.get("tokens") and data.get("seconds"):
            values["tokens_per_second"] = data["tokens"] / data["seconds"]
        self._values(run, values, event)
        self._client.set_terminated(run, _STATUS[data["status"]], event.time)

    def _run_finished(self, event: Event) -> None:
        run = self._runs.parent(event)
        self._values(run, event.data.get("metrics") or {}, event)
        self._client.set_terminated(run, _STATUS[event.data["status"]], event.time)

    def _values(self, run: str, values: Mapping[str, Any], event: Event) -> None:
        self._points(run, [(k, v, event.time, 0) for k, v in numbers(values).items()])

    def _artifact(self, event: Event) -> None:
        path = self._folder.absolute(event.data["path"])
        if path.is_dir():
            self._client.log_artifacts(self._runs.of(event), str(path), path.name)
        else:
            self._client.log_artifact(self._runs.of(event), str(path))
