"""The student as a registered model: uploaded once, then `candidate`, then perhaps `champion`."""

from typing import TYPE_CHECKING

from stillhouse.errors import TrackingError
from stillhouse.storage.events import Event
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.tracking import flavour
from stillhouse.storage.tracking.champions import crown
from stillhouse.storage.tracking.fields import entity_name, flattened, quoted
from stillhouse.storage.tracking.runs import ID_TAG, RunStore

if TYPE_CHECKING:
    from mlflow import MlflowClient

CANDIDATE = "candidate"
UNKNOWN_DECODING = {"max_new_tokens": 256, "stop": []}  # of events that do not name it


class ModelStore:
    """The versions that one run registers."""

    def __init__(self, client: "MlflowClient", uri: str, folder: RunFolder, runs: RunStore) -> None:
        self._client, self._uri, self._folder, self._runs = client, uri, folder, runs

    def register(self, event: Event) -> None:
        """Register a checkpoint folder as a new version with the alias `candidate`."""
        name = str(event.data["name"])
        identity = f"{self._runs.state.identity}/{event.data.get('digest') or event.id}"
        model_id = self._logged_model(identity) or self._log_model(identity, event)
        registered = self._version(identity, name, model_id, event)
        self._client.set_registered_model_alias(name, CANDIDATE, registered)
        self._runs.state.versions[name] = registered
        self._runs.save()

    def promote(self, event: Event) -> None:
        """Move `champion` to the version this run registered, whatever `candidate` is by now."""
        name = str(event.data["name"])
        registered = self._runs.state.versions.get(name)
        if registered is None:
            raise TrackingError(
                f"event {event.id} promotes the model {name!r}, which this run has not registered "
                f"(registered: {sorted(self._runs.state.versions) or 'none'})."
            )
        crown(self._client, name, registered)

    def _logged_model(self, identity: str) -> str | None:
        """Return the id of the model this event has logged; half-uploaded ones are deleted."""
        wanted = f"tags.`{ID_TAG}` = '{identity}'"
        for model in self._client.search_logged_models([self._runs.experiment], wanted):
            if str(model.status) == "READY":
                return str(model.model_id)
            self._client.delete_logged_model(model.model_id)
        return None

    def _log_model(self, identity: str, event: Event) -> str:
        """Upload a checkpoint folder as it lies there; no weights are loaded."""
        import mlflow
        from mlflow.models import Model

        mlflow.set_tracking_uri(self._uri)
        mlflow.set_registry_uri(self._uri)
        run, data = self._runs.of(event), event.data
        with mlflow.start_run(run_id=run):
            logged = Model.log(
                None,
                flavour,
                name=entity_name(str(data["name"])).replace("/", "_"),
                flavor_name="transformers",
                tags={ID_TAG: identity},
                folder=self._folder.absolute(data["path"]),
                task=data.get("task") or "text-generation",
                decoding=data.get("decoding") or UNKNOWN_DECODING,
            )
        self._client.update_run(run, status="RUNNING")  # leaving the block ended it
        return str(logged.model_id)

    def _version(self, identity: str, name: str, model_id: str, event: Event) -> str:
        if not self._client.search_registered_models(f"name = {quoted(name)}"):
            self._client.create_registered_model(name)
        wanted = f"name = {quoted(name)} and tags.`{ID_TAG}` = '{identity}'"
        for found in self._client.search_model_versions(wanted):
            return str(found.version)
        tags = {ID_TAG: identity, **flattened(event.data.get("tags") or {})}
        made = self._client.create_model_version(
            name, f"models:/{model_id}", self._runs.of(event), tags, model_id=model_id
        )
        return str(made.version)
