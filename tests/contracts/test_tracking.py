"""Guarantee 14 of README.md: a run without its tracking server loses nothing that it would log."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest

from stillhouse.storage.catalog import Catalog
from stillhouse.storage.integrity import sha256_of
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.manifest import Manifest
from stillhouse.storage.tracking.settings import mlflow_quiet
from tests.contracts.tiny_run import LIMIT, facts_of, keys_of, stillhouse
from tests.mlflow_server import MlflowServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def outcome(clean_run: RunFolder, tmp_path_factory, cache_root: Path):
    """A finished run deploys again with its server away, then again with the server there."""
    home = tmp_path_factory.mktemp("tracked")
    shutil.copytree(clean_run.root, home / "runs" / "tiny")
    server = MlflowServer(home)
    arguments = ["run", "tiny", f"runs_root={home / 'runs'}", "deploy.questions=7"]
    arguments += ["tracking.enabled=true", f"tracking.uri={server.uri}"]
    away = stillhouse(cache_root, *arguments)
    server.start()
    there = stillhouse(cache_root, *arguments)
    yield away, there, server
    server.stop()


@pytest.fixture(scope="module")
def client(outcome):
    with mlflow_quiet():
        from mlflow import MlflowClient

        uri = outcome[2].uri
        yield MlflowClient(uri, registry_uri=uri)  # else that of whoever set it last here


def test_the_run_says_that_the_server_is_away_and_goes_on(outcome) -> None:
    away = outcome[0]
    assert away.code == 0, away.err
    assert "MLflow cannot be reached" in away.text
    assert "✓ deploy" in away.text


def test_the_next_start_uploads_and_does_nothing_else(outcome) -> None:
    there = outcome[1]
    assert there.code == 0, there.err
    assert "✓" not in there.text
    assert "cannot be reached" not in there.text


def test_the_server_has_the_run_its_stage_and_the_result(client) -> None:
    [experiment] = client.search_experiments(filter_string="name = 'stillhouse'")
    runs = client.search_runs([experiment.experiment_id])
    by_name = {run.info.run_name: run for run in runs}
    assert {"tiny", "deploy"} <= by_name.keys()
    parent, child = by_name["tiny"], by_name["deploy"]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert parent.data.metrics.keys() >= {"accuracy.student", "cache.kl_mean"}
    assert child.data.params["questions"] == "7"
    names = [item.dataset.name for item in child.inputs.dataset_inputs]
    assert "deploy.deployments" in names


def test_the_student_is_registered_and_promoted_by_the_gate(client) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        versions = [
            client.get_model_version_by_alias("stillhouse-student", alias).version
            for alias in ("candidate", "champion")
        ]
    assert versions[0] == versions[1]


@pytest.fixture(scope="module")
def tracked(outcome) -> RunFolder:
    return RunFolder(outcome[2].home / "runs" / "tiny")


def test_a_deployed_folder_leads_to_its_version_and_its_run(client, tracked) -> None:
    manifest = tracked.root / facts_of(tracked, "deploy")["facts"]["model"] / "stillhouse.json"
    [version] = client.search_model_versions(
        f"tags.`stillhouse.manifest` = '{sha256_of(manifest)}'"
    )
    run = client.get_run(version.run_id)
    assert run.info.run_name == "deploy"
    assert client.get_run(run.data.tags["mlflow.parentRunId"]).info.run_name == "tiny"
    [made] = run.outputs.model_outputs
    assert version.source == f"models:/{made.model_id}"


def test_a_registered_student_answers_as_evaluated_on_its_cache(client, tracked) -> None:
    query = """SELECT rendered, prediction FROM evaluations JOIN questions USING (question_id)
        WHERE arm = 'student_compressed' AND evaluations.status = 'kept' ORDER BY question_id"""
    with Catalog(tracked, Manifest(tracked), keys_of(tracked)) as catalog:
        prompts, predictions = zip(*catalog.rows(query), strict=True)
    registered = predict("models:/stillhouse-student@champion", client.tracking_uri, prompts)
    assert registered == list(predictions)


def predict(model: str, uri: str, prompts: Sequence[str]) -> list[str]:
    """`mlflow models predict` in this environment."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mlflow",
            "models",
            "predict",
            "-m",
            model,
            "--env-manager",
            "local",
        ],
        input=json.dumps({"inputs": prompts}),
        env={**os.environ, "MLFLOW_TRACKING_URI": uri, "MLFLOW_REGISTRY_URI": uri},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=True,
    )
    answers: list[str] = json.loads(done.stdout)["predictions"]
    return answers
