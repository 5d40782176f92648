"""A registered student behind `mlflow models serve`: what it answers, and what it refuses."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.configs.base import keyed_values
from stillhouse.configs.stages import CompressConfig
from stillhouse.storage.events import EventLog
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.tracking.database import default_uri
from stillhouse.storage.tracking.settings import mlflow_quiet
from stillhouse.storage.tracking.tracker import Tracker
from stillhouse.workers.local import LocalWorkers
from stillhouse.workers.protocols import (
    CacheSpec,
    CalibrateJob,
    Completion,
    Decoding,
    ExportJob,
    ModelSpec,
)
from tests.mlflow_server import ScoringServer, isolate_mlflow
from tests.workers.conftest import write_model

pytestmark = pytest.mark.slow

CONFIG = CompressConfig(key_bits=2, value_bits=2, sinks=1)
HOW = Decoding(max_new_tokens=24, stop=("\n",))
PROMPTS = [f"Prompt {n} ends in {chr(97 + 2 * n)}" for n in range(6)]
REFUSED: list[tuple[object, str]] = [
    ({"inputs": PROMPTS, "params": {"max_new_tokens": 0}}, "max_new_tokens: expected 1 or more"),
    ({"inputs": PROMPTS, "params": {"max_new_tokens": "x"}}, "Can not safely convert"),
    ({"inputs": PROMPTS, "params": {"temperature": -1}}, "temperature: expected 0 (greedy)"),
    ({"inputs": PROMPTS, "params": {"stop": [""]}}, "stop: expected strings that are not empty"),
    ({"inputs": PROMPTS, "params": {"seed": None}}, "seed: expected a whole number"),
    ({"inputs": ["short", "long " * 40]}, "prompt 1: prompt_too_long: 200 tokens, room for 72"),
    ({"inputs": [""]}, "prompt 0: empty_prompt"),
    ({"inputs": [["nested"]]}, "prompt 0: expected a string, found ['nested']"),
    ({"dataframe_split": {"columns": ["prompt"], "data": [[3]]}}, "prompt 0: expected a string"),
    ({"dataframe_split": {"columns": ["text"], "data": [["a"]]}}, "missing inputs ['prompt']"),
    ({"messages": [{"role": "user", "content": "a"}]}, "missing inputs ['prompt']"),
    (b"no JSON", "valid JSON"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A student exported with a fitted cache of 2 bits: on 16 bits it answers otherwise."""
    home = tmp_path_factory.mktemp("registered")
    folder, model = RunFolder(home / "run"), ModelSpec(str(write_model("llama", home / "model")))
    workers = LocalWorkers(home / "cache", threads=1)
    deterministic = torch.are_deterministic_algorithms_enabled()
    workers.calibrate(CalibrateJob(model, [text * 3 for text in PROMPTS], CONFIG, home / "plan"))
    manifest: dict[str, object] = {"cache": keyed_values(CONFIG)}
    target = folder.root / "student"
    workers.export(ExportJob(model, target, "float32", manifest, home / "plan"))
    torch.use_deterministic_algorithms(deterministic)
    return folder


@pytest.fixture(scope="module")
def registry(folder: RunFolder) -> Iterator[Any]:
    """A client of the database beside the run, the default, where that student is registered."""
    log, uri = EventLog(folder), default_uri(folder.root.parent)
    log.emit("run_started", params={}, tags={})
    log.emit(
        "model", path="student", name="scored", task="text-generation", digest="d" * 16,
        decoding={"max_new_tokens": HOW.max_new_tokens, "stop": HOW.stop},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, mlflow_quiet():
        isolate_mlflow(patch)
        assert Tracker(folder, log, uri, "scored", "run").flush() == 2
        from mlflow import MlflowClient

        patch.setenv("MLFLOW_TRACKING_URI", uri)
        patch.setenv("MLFLOW_REGISTRY_URI", uri)
        yield MlflowClient(uri, uri)


@pytest.fixture
def scoring(registry: Any, tmp_path: Path) -> Iterator[ScoringServer]:
    server = ScoringServer(tmp_path / "log")
    try:
        server.start(registry.tracking_uri, "models:/scored@candidate")
        yield server
    finally:
        server.stop()


def in_process(folder: RunFolder, how: Decoding, *, packed: bool = True) -> list[str]:
    """What the exported copy answers here, on its plan or on 16 bits."""
    student = folder.root / "student"
    worker = LocalWorkers(folder.root / "unused", threads=1).model(ModelSpec(str(student)))
    answers = worker.answer(PROMPTS, how, CacheSpec(CONFIG, student / "cache") if packed else None)
    return [answer.text for answer in answers if isinstance(answer, Completion)]


def test_what_a_scoring_server_answers_and_refuses(scoring, folder) -> None:
    check_answers(scoring, folder)
    check_parameters(scoring, folder)
    for body, reason in REFUSED:
        status, answer = scoring.post(body)
        assert (status, reason in answer["message"]) == (400, True), (body, status, answer)
    assert scoring.post({"inputs": PROMPTS[:1]})[0] == 200


def check_answers(scoring: ScoringServer, folder: RunFolder) -> None:
    expected, full = in_process(folder, HOW), in_process(folder, HOW, packed=False)
    assert all(one != other for one, other in zip(expected, full, strict=True))
    table = {"columns": ["prompt"], "data": [[prompt] for prompt in PROMPTS]}
    assert scoring.post({"inputs": PROMPTS}) == (200, {"predictions": expected})
    assert scoring.post({"dataframe_split": table}) == (200, {"predictions": expected})
    assert scoring.post({"prompt": PROMPTS[1]}) == (200, expected[1:2])
    assert scoring.post({"inputs": []}) == (200, {"predictions": []})


def check_parameters(scoring: ScoringServer, folder: RunFolder) -> None:
    params = {"max_new_tokens": 9, "stop": [" "], "temperature": 0.7, "seed": 4}
    expected = in_process(folder, Decoding(9, (" ",), 0.7, 4))
    assert scoring.post({"inputs": PROMPTS, "params": params}) == (200, {"predictions": expected})
    status, other = scoring.post({"inputs": PROMPTS, "params": params | {"seed": 5}})
    assert status == 200
    assert other["predictions"] != expected


def test_what_is_registered(registry: Any, folder: RunFolder) -> None:
    """Transformers' flavour loads, the folder is whole, its run is named, nothing is a pickle."""
    import mlflow.artifacts
    import mlflow.transformers

    made = mlflow.transformers.load_model("models:/scored@candidate", return_type="components")
    assert made["model"].config.model_type == "llama"
    version = registry.get_model_version_by_alias("scored", "candidate")
    copy = Path(mlflow.artifacts.download_artifacts("models:/scored@candidate"))
    assert f"run_id: {version.run_id}" in (copy / "MLmodel").read_text()
    assert digests(copy / "model") == digests(folder.root / "student")
    assert not [path for path in copy.rglob("*") if path.suffix in {".pkl", ".bin", ".pt"}]
    packages = {line.split("==")[0] for line in (copy / "requirements.txt").read_text().split()}
    assert packages == {"mlflow", "stillhouse", "torch", "transformers"}


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
