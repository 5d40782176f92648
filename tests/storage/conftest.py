"""What the storage tests share: a run folder to put rows in, and a clean environment for MLflow."""

import os
from pathlib import Path

import pytest

from stillhouse.storage.layout import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "it's a run")  # a quote and spaces, as users have


@pytest.fixture
def mlflow_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine's MLflow reaches a test, none of ours stays after it."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    # set and undone here, because the tracker sets what is missing and MLflow sets its URI
    for name, value in (
        ("MLFLOW_TRACKING_URI", "sqlite:////nowhere/else.db"),
        ("MLFLOW_REGISTRY_URI", "sqlite:////nowhere/else.db"),
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "30"),
        ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"),
        ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
    ):
        monkeypatch.setenv(name, value)
