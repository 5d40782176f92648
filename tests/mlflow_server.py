"""Real MLflow servers for tests, on free loopback ports: one tracks (sqlite), one answers."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

STARTUP = 120  # seconds


def isolate_mlflow(patch: pytest.MonkeyPatch) -> None:
    """No setting of the machine's MLflow is seen until `patch` is undone, none of ours after."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        patch.delenv(name)
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
        patch.setenv(name, value)


class _LocalServer:
    """A command of MLflow's on a free loopback port, which can be stopped and started again."""

    def __init__(self, log: Path) -> None:
        self._log = log
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def _start(self, *arguments: str, **variables: str) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        environment |= {"MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONWARNINGS": "ignore", **variables}
        command = [sys.executable, "-m", "mlflow", *arguments]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self._wait()

    def _wait(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + STARTUP
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                    return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError(self._log.read_text()[-3000:])

    def stop(self) -> None:
        if self._process is None:
            return
        os.killpg(self._process.pid, signal.SIGKILL)  # its workers too, and no goodbye
        self._process.wait()
        self._process = None


class MlflowServer(_LocalServer):
    """`mlflow server`, with its database and its artifacts in `home`."""

    def __init__(self, home: Path) -> None:
        self.home = home
        super().__init__(home / "server.log")

    def start(self) -> None:
        stores = ["--backend-store-uri", f"sqlite:///{self.home}/server.db"]
        stores += ["--artifacts-destination", str(self.home / "artifacts")]
        self._start("server", *stores)


class ScoringServer(_LocalServer):
    """`mlflow models serve` of a registered model, in this environment."""

    def start(self, tracking_uri: str, model_uri: str) -> None:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # it calls uvicorn by name
        options = ["-m", model_uri, "--env-manager", "local"]
        self._start("models", "serve", *options, MLFLOW_TRACKING_URI=tracking_uri, PATH=path)

    def post(self, body: object) -> tuple[int, Any]:
        """The status and the JSON of `/invocations`."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.uri}/invocations", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as refusal:
            with refusal:
                return refusal.code, json.load(refusal)
