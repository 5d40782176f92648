import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillhouse.configs.stages import LoraConfig
from stillhouse.errors import ModelError
from stillhouse.storage.integrity import sha256_of
from stillhouse.workers.adapter_training import adapter_parameters, put_adapter, write_adapter
from stillhouse.workers.exporter import export
from stillhouse.workers.models.language_model import load
from stillhouse.workers.protocols import ExportJob, ModelSpec, Pair
from stillhouse.workers.scorer import response_logps

PAIRS = [Pair("Q: a\nA:", " yes"), Pair("another prompt", " n")]


@pytest.fixture
def adapter(model_folders, store, tmp_path):
    """Writes an adapter with values drawn from a normal distribution."""

    def make(kind, std=0.2):
        adapted = put_adapter(
            load(store, ModelSpec(str(model_folders[kind]))).model, LoraConfig(rank=2), "ref", 0
        )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in adapter_parameters(adapted).values():
                parameter.normal_(std=std, generator=generator)
        folder = tmp_path / f"adapter_{kind}"
        folder.mkdir()
        write_adapter(adapted, folder)
        return ModelSpec(str(model_folders[kind]), folder)

    return make


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_the_exported_model_says_what_base_and_adapter_say(kind, adapter, store, tmp_path):
    spec, target = adapter(kind), tmp_path / "out"
    expected = response_logps(load(store, spec), PAIRS, 2)
    files = export(load(store, spec), ExportJob(spec, target, "float32", {"run": "r"}))
    made = response_logps(load(store, ModelSpec(str(target))), PAIRS, 2)
    for one, other in zip(made, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logp == pytest.approx(other.logp, abs=1e-4)
    manifest = json.loads((target / "stillhouse.json").read_text())
    assert manifest["run"] == "r"
    assert manifest["files"] == {
        file.name: sha256_of(file) for file in files if file.name != "stillhouse.json"
    }


def test_transformers_alone_loads_it_with_bos_and_eos(adapter, store, tmp_path):
    spec, target = adapter("gemma"), tmp_path / "out"
    lm = load(store, spec)
    export(lm, ExportJob(spec, target, "bfloat16", {}))
    model = AutoModelForCausalLM.from_pretrained(target)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == list(lm.eos_ids)
    assert model.generation_config.repetition_penalty in {None, 1.0}
    assert AutoTokenizer.from_pretrained(target)("a").input_ids[0] == lm.bos


def test_the_same_job_gives_the_same_bytes(adapter, store, tmp_path):
    spec = adapter("llama")
    one, two = (
        export(load(store, spec), ExportJob(spec, tmp_path / name, "float32", {"run": "r"}))
        for name in ("one", "two")
    )
    assert [file.name for file in one] == [file.name for file in two]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True))
    assert all(str(tmp_path) not in file.read_bytes().decode("latin1") for file in one)


def test_weights_out_of_range_are_refused_and_nothing_is_left(adapter, store, tmp_path):
    spec = adapter("llama", std=1e3)
    with pytest.raises(ModelError, match=r"finite weights.*float16"):
        export(load(store, spec), ExportJob(spec, tmp_path / "out", "float16", {}))
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_is_not_finite_is_refused(adapter, store, tmp_path):
    spec = adapter("llama", std=float("inf"))
    with pytest.raises(ModelError, match="cannot be merged"):
        export(load(store, spec), ExportJob(spec, tmp_path / "out", "float32", {}))


def test_an_unknown_dtype_is_refused(llama, tmp_path):
    with pytest.raises(ModelError, match="int8"):
        export(llama, ExportJob(ModelSpec("ref"), tmp_path / "out", "int8", {}))
