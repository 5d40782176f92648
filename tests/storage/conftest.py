"""What the storage tests share: a run folder to put rows in, and a clean environment for MLflow."""

from pathlib import Path

import pytest

from stillhouse.storage.layout import RunFolder
from tests.mlflow_server import isolate_mlflow


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "it's a run")  # a quote and spaces, as users have


@pytest.fixture
def mlflow_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine's MLflow reaches a test, none of ours stays after it."""
    isolate_mlflow(monkeypatch)
