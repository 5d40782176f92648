"""Which version of a registered model is `champion`, and which was before it."""

from typing import TYPE_CHECKING

from stillhouse.errors import TrackingError
from stillhouse.storage.tracking.settings import mlflow_quiet

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION = "champion"
REPLACED_TAG = "stillhouse.replaced"  # of a version: the champion before it


def crown(client: "MlflowClient", name: str, version: str) -> None:
    """Make a version champion; it remembers which one it replaced the first time."""
    before = _champion(client, name)
    tags = client.get_model_version(name, version).tags
    # Once: two versions that replaced each other would be rolled back to for ever.
    if before not in (None, version) and REPLACED_TAG not in tags:
        client.set_model_version_tag(name, version, REPLACED_TAG, before)
    client.set_registered_model_alias(name, CHAMPION, version)


def roll_back(uri: str, name: str) -> tuple[str, str]:
    """Give the title back to the champion before; both versions, the one that leaves it first.

    TrackingError when there is no such model, no champion, or none before it.
    """
    with mlflow_quiet():
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        client = MlflowClient(uri, uri)
        now = _champion(client, name)
        if now is None:
            raise TrackingError(
                f"expected a champion of {name!r} at {uri}, found none; nothing was promoted there"
            )
        before = client.get_model_version(name, now).tags.get(REPLACED_TAG)
        if before is None:
            raise TrackingError(
                f"expected a champion of {name!r} before version {now}, found none: it is the first"
            )
        try:
            client.set_registered_model_alias(name, CHAMPION, before)
        except MlflowException as error:
            raise TrackingError(
                f"expected version {before} of {name!r}, the champion before {now}, found none "
                f"that can be it: {error}"
            ) from error
    return now, before


def _champion(client: "MlflowClient", name: str) -> str | None:
    from mlflow.exceptions import MlflowException

    try:
        return str(client.get_model_version_by_alias(name, CHAMPION).version)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise TrackingError(f"the tracking server refused to name a champion: {error}") from error
