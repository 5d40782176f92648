"""An exported student answers on the cache that goes with it."""

import json
import threading

import pytest
import torch

from stillhouse.configs.base import keyed_values
from stillhouse.configs.stages import CompressConfig
from stillhouse.errors import ModelError
from stillhouse.workers.exported import ExportedModel, exported_cache
from stillhouse.workers.local import LocalWorkers
from stillhouse.workers.protocols import (
    CacheSpec,
    CalibrateJob,
    Completion,
    Decoding,
    ExportJob,
    ModelSpec,
)

CONFIG = CompressConfig(key_bits=2, value_bits=2, sinks=1)
HOW = Decoding(max_new_tokens=24)
PROMPTS = [f"Prompt {n} ends in {chr(97 + 2 * n)}" for n in range(6)]


@pytest.fixture
def workers(tmp_path):
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield LocalWorkers(tmp_path / "cache", threads=1)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def export(workers, model_folders, tmp_path):
    def make(calibrate):
        model, plan = ModelSpec(str(model_folders["llama"])), None
        if calibrate:
            plan = tmp_path / "plan"
            workers.calibrate(CalibrateJob(model, [text * 3 for text in PROMPTS], CONFIG, plan))
        manifest: dict[str, object] = {"cache": keyed_values(CONFIG)}
        workers.export(ExportJob(model, tmp_path / "out", "float32", manifest, plan))
        return tmp_path / "out"

    return make


@pytest.mark.parametrize("calibrate", [True, False], ids=["plan", "k2v2"])
def test_it_answers_as_in_process_with_its_cache(calibrate, export, workers):
    folder = export(calibrate)
    worker = workers.model(ModelSpec(str(folder)))
    spec = CacheSpec(CONFIG, folder / "cache" if calibrate else None)
    expected = worker.answer(PROMPTS, HOW, spec)
    assert all(isinstance(answer, Completion) for answer in expected)
    for other in (None, CacheSpec(CONFIG)) if calibrate else (None,):
        found = worker.answer(PROMPTS, HOW, other)
        assert all(one != another for one, another in zip(expected, found, strict=True))
    assert ExportedModel(folder).answer(PROMPTS, HOW) == expected
    assert exported_cache(folder) == spec


def test_callers_at_once_each_get_their_own_answers(export):
    model = ExportedModel(export(calibrate=False))
    asked = [([PROMPTS[n]], Decoding(max_new_tokens=8 + n)) for n in range(len(PROMPTS))]
    alone = {index: model.answer(*one) for index, one in enumerate(asked)}
    together = {}

    def ask(index):
        together[index] = model.answer(*asked[index])

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


@pytest.mark.parametrize("cache", [None, "k4v4", {"key_bits": 9}, {"bits": 4}])
def test_a_manifest_that_names_no_cache_is_refused(cache, tmp_path):
    (tmp_path / "stillhouse.json").write_text(json.dumps({"cache": cache}))
    with pytest.raises(ModelError, match=r"stillhouse\.json: expected the settings of a cache"):
        ExportedModel(tmp_path)


def test_a_folder_that_nobody_exported_is_refused(model_folders):
    with pytest.raises(ModelError, match=r"expected stillhouse\.json in"):
        ExportedModel(model_folders["llama"])
