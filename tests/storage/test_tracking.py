"""What a real MLflow server knows after an upload, read back through its own client."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from stillhouse.errors import TrackingError
from stillhouse.storage.events import EventLog
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.tracking.champions import crown, roll_back
from stillhouse.storage.tracking.database import default_uri
from stillhouse.storage.tracking.tracker import Tracker

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("mlflow_environment")]


@pytest.fixture
def client(mlflow_server):
    return MlflowClient(mlflow_server.uri, mlflow_server.uri)


def make_checkpoint(path: Path) -> None:
    """Save a Llama without its weights, which nobody reads here, and a tokenizer of four words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "a": 2, "b": 3}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<eos>"
    )
    config = LlamaConfig(
        vocab_size=4,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    (path / "model.safetensors").write_bytes(b"no weights")
    tokenizer.save_pretrained(path)


def tell_the_first_half(log: EventLog) -> None:
    log.emit(
        "run_started",
        params={
            "seed": 3,
            "score": {"batch_size": 8},
            "hub_token": "hf_private",
            "long": "x" * 9_000,
        },
        tags={"recipe": "tiny", "machine": "laptop"},
    )
    log.emit("stage_started", "score", key="k1", params={"model": "specialist", "max_tokens": 64})
    log.emit(
        "dataset", "score", name="prompts", path="p.parquet", digest="a" * 64, rows=9,
        source="ingest", parents=[],
    )  # fmt: skip
    log.emit(  # of other settings: not what the scores below were made from
        "dataset", "score", name="prompts", path="q.parquet", digest="c" * 64, rows=8,
        source="ingest", parents=[],
    )  # fmt: skip
    log.emit(
        "dataset", "score", name="scores", path="s.parquet", digest="b" * 64, rows=7,
        source="score", parents=[{"name": "prompts", "digest": "a" * 64}],
    )  # fmt: skip
    counts = {"rows_in": 9, "kept": 7, "rejected": 0, "failed": 2}
    log.emit("stage_finished", "score", counts=counts, seconds=2.0, tokens=500, status="finished")
    log.emit("stage_started", "distill", key="k2", params={"learning_rate": 0.001})
    for step in range(1, 1_201):
        log.emit("metric", "distill", name="loss", value=3.0 / step, step=step)


def tell_the_second_half(log: EventLog) -> None:
    log.emit("artifact", path="report.json")
    for _ in range(2):  # a run that was killed amid a stage's events tells them again
        log.emit(
            "model", "distill", path="checkpoint", name="student", task="text-generation",
            tags={"recovery": 0.7}, digest="d" * 16,
        )  # fmt: skip
    log.emit("promote", name="student")
    counts = {"rows_in": 7, "kept": 7, "rejected": 0, "failed": 0}
    log.emit("stage_finished", "distill", counts=counts, seconds=1.5, tokens=700, status="finished")
    log.emit(
        "run_finished", status="finished", metrics={"recovery": 0.7, "accuracy": {"base": 0.0}}
    )


def forget_all_but_the_identity(folder: RunFolder) -> None:
    for cursor in folder.tracking.glob("*.cursor.json"):
        cursor.unlink()
    (state,) = folder.tracking.glob("*.runs.json")
    state.write_text(json.dumps({"identity": json.loads(state.read_text())["identity"]}))


def runs_of(client: MlflowClient, experiment: str):
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {run.info.run_name: run for run in runs if run is not parent}
    assert len(children) == len(runs) - 1
    return parent, children


def test_a_run_its_outage_and_its_resume_are_read_back(folder, mlflow_server, client) -> None:
    experiment = "whole-line"
    folder.root.mkdir(parents=True)
    folder.report.write_text(json.dumps({"recovery": 0.7}))
    make_checkpoint(folder.root / "checkpoint")
    log = EventLog(folder)
    tell_the_first_half(log)

    def tracker() -> Tracker:
        return Tracker(folder, EventLog(folder), mlflow_server.uri, experiment, "tiny")

    assert tracker().probe() is None
    assert tracker().flush() == 7 + 1_200
    assert tracker().flush() == 0

    # An outage: the run says so, goes on, and keeps what happened.
    mlflow_server.stop()
    assert "no server answers at http://127.0.0.1" in str(tracker().probe())
    log.emit("run_started", params={"seed": 3, "score": {"batch_size": 16}}, tags={})
    tell_the_second_half(log)
    assert tracker().flush() == 0
    mlflow_server.start()

    # A kill before the ids and the acknowledgement are written: everything is told twice.
    assert tracker().flush() == 7
    forget_all_but_the_identity(folder)
    assert tracker().flush() == 7 + 1_200 + 7

    parent, children = runs_of(client, experiment)
    assert parent.info.run_name == "tiny"
    assert parent.info.status == "FINISHED"
    assert set(children) == {"score", "distill"}
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {
        parent.info.run_id
    }
    assert {run.info.status for run in children.values()} == {"FINISHED"}
    check_parameters(parent, children)
    check_metrics(client, parent, children)
    check_datasets(children["score"])
    check_model(client, children["distill"])
    assert [file.path for file in client.list_artifacts(parent.info.run_id)] == ["report.json"]


def check_parameters(parent, children) -> None:
    assert parent.data.params["seed"] == "3"
    assert parent.data.params["score.batch_size"] == "8"
    assert parent.data.tags["changed.score.batch_size"] == "16"
    assert parent.data.tags["recipe"] == "tiny"
    assert parent.data.params["hub_token"] == "[redacted]"
    assert len(parent.data.params["long"]) == 6_000
    assert "9000 characters" in parent.data.params["long"]
    assert children["score"].data.params == {"model": "specialist", "max_tokens": "64"}


def check_metrics(client, parent, children) -> None:
    history = client.get_metric_history(children["distill"].info.run_id, "loss")
    assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == [
        (step, 3.0 / step) for step in range(1, 1_201)
    ]
    assert children["score"].data.metrics == {
        "rows_in": 9, "kept": 7, "rejected": 0, "failed": 2,
        "seconds": 2.0, "tokens": 500, "tokens_per_second": 250.0,
    }  # fmt: skip
    assert parent.data.metrics == {"recovery": 0.7, "accuracy.base": 0.0}


def check_datasets(run) -> None:
    logged = {
        (found.dataset.name, tag.value): found.dataset
        for found in run.inputs.dataset_inputs
        for tag in found.tags
        if tag.key == "mlflow.data.context"
    }
    assert {(name, context) for name, context in logged} >= {("scores", "output")}
    scores = logged["scores", "output"]
    assert scores.digest == "b" * 36
    assert json.loads(scores.source)["uri"].endswith("s.parquet")
    profile = json.loads(scores.profile)
    assert profile == {"num_rows": 7, "parents": [f"prompts@{'a' * 36}"], "made_by": "score"}
    found = [item.dataset for item in run.inputs.dataset_inputs]
    assert {f"{dataset.name} {dataset.digest[0]}" for dataset in found} == {
        "prompts a", "prompts c", "scores b",
    }  # fmt: skip


def check_model(client, run) -> None:
    (version,) = client.search_model_versions("name = 'student'")
    assert client.get_model_version_by_alias("student", "candidate").version == version.version
    assert client.get_model_version_by_alias("student", "champion").version == version.version
    assert version.run_id == run.info.run_id
    assert version.tags["recovery"] == "0.7"
    (model,) = client.search_logged_models([run.info.experiment_id])
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
    assert version.source == f"models:/{model.model_id}"
    files = {
        file.path.rsplit("/")[-1] for file in client.list_logged_model_artifacts(model.model_id)
    }
    assert "MLmodel" in files


def test_what_the_server_refuses_is_said_and_kept(folder, mlflow_server, client) -> None:
    log = EventLog(folder)
    log.emit("run_started", params={}, tags={})
    log.emit("promote", name="never-registered")
    tracker = Tracker(folder, log, mlflow_server.uri, "refusals", "r")
    with pytest.raises(TrackingError, match=r"event 2 promotes .* has not registered"):
        tracker.flush()
    log = EventLog(folder)
    log.emit("artifact", path="not there.txt")
    assert [event.id for event in log.pending(tracker._cursor)] == [2, 3]

    experiment = client.get_experiment_by_name("refusals")
    client.delete_experiment(experiment.experiment_id)
    again = Tracker(folder, EventLog(folder), mlflow_server.uri, "refusals", "r")
    with pytest.raises(TrackingError, match="has been deleted"):
        again.flush()


def test_an_artifact_that_is_missing_is_named(folder, mlflow_server) -> None:
    log = EventLog(folder)
    log.emit("artifact", path="missing.txt")
    tracker = Tracker(folder, log, mlflow_server.uri, "missing", "r")
    with pytest.raises(TrackingError, match=r"event 1 \(artifact.*missing\.txt.*Nothing is lost"):
        tracker.flush()


def test_the_default_is_a_database_beside_the_runs(folder, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    uri = default_uri(Path("runs"))
    assert uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    log = EventLog(folder)
    log.emit("run_started", params={"a": 1}, tags={})
    log.emit("metric", None, name="loss", value=0.5, step=1)
    tracker = Tracker(folder, log, uri, "local", "run")
    assert tracker.probe() is None
    assert tracker.flush() == 2
    client = MlflowClient(uri, uri)
    (run,) = client.search_runs([client.get_experiment_by_name("local").experiment_id])
    assert run.data.params == {"a": "1"}
    assert run.info.artifact_uri.startswith(f"file://{tmp_path}/runs/mlartifacts/")


def test_how_a_run_and_its_stage_ended_is_read_back(folder, mlflow_server, client) -> None:
    log = EventLog(folder)
    log.emit("run_started", params={}, tags={})
    log.emit("stage_started", "distill", key="k", params={})
    log.emit("stage_finished", "distill", key="k", status="failed")
    log.emit("run_finished", status="killed", metrics={})
    Tracker(folder, log, mlflow_server.uri, "stopped", "r").flush()
    runs = client.search_runs([client.get_experiment_by_name("stopped").experiment_id])
    assert {run.info.run_name: run.info.status for run in runs} == {
        "r": "KILLED",
        "distill": "FAILED",
    }


def test_two_runs_may_make_the_database_at_once(tmp_path) -> None:
    script = """
import sys
from pathlib import Path
from stillhouse.storage.events import EventLog
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.tracking.database import default_uri
from stillhouse.storage.tracking.tracker import Tracker
import mlflow.store.tracking.sqlalchemy_store
root, name = Path(sys.argv[1]), sys.argv[2]
log = EventLog(RunFolder(root / name))
log.emit("run_started", params={}, tags={})
print("ready", flush=True)
sys.stdin.read(1)
assert Tracker(RunFolder(root / name), log, default_uri(root), "both", name).flush() == 1
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for name in ("one", "two")
    ]
    for process in processes:
        assert process.stdout.readline() == b"ready\n"
    for process in processes:
        process.stdin.write(b"g")
        process.stdin.flush()
    for process in processes:
        assert (process.communicate()[1][-2000:], process.returncode) == (b"", 0)
    client = MlflowClient(default_uri(tmp_path))
    runs = client.search_runs([client.get_experiment_by_name("both").experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["one", "two"]


def test_the_champion_before_is_one_step_away(mlflow_server, client) -> None:
    client.create_registered_model("crowned")
    first, second, third = (
        str(client.create_model_version("crowned", "s3://nowhere/model").version) for _ in range(3)
    )
    with pytest.raises(TrackingError, match="expected a champion of 'crowned' at"):
        roll_back(mlflow_server.uri, "crowned")
    crown(client, "crowned", first)
    with pytest.raises(TrackingError, match="before version 1, found none: it is the first"):
        roll_back(mlflow_server.uri, "crowned")
    crown(client, "crowned", second)
    crown(client, "crowned", second)  # a resumed run promotes again
    assert roll_back(mlflow_server.uri, "crowned") == (second, first)
    crown(client, "crowned", second)
    crown(client, "crowned", third)
    crown(client, "crowned", first)  # an event that was delivered late
    crown(client, "crowned", third)
    assert roll_back(mlflow_server.uri, "crowned") == (third, second)
    assert roll_back(mlflow_server.uri, "crowned") == (second, first)
    assert client.get_model_version_by_alias("crowned", "champion").version == first
    with pytest.raises(TrackingError, match="expected a champion of 'nobody'"):
        roll_back(mlflow_server.uri, "nobody")
