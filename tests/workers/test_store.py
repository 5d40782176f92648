"""The model store: conversion once and whole, and refusal of what cannot be loaded safely."""

import errno
import json
import shutil
import threading
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file

from stillhouse.errors import ModelError, StorageFullError
from stillhouse.workers.models import cache_folder
from stillhouse.workers.models.cache_folder import build_once, default_cache_root
from stillhouse.workers.models.gguf_header import read_header
from stillhouse.workers.models.store import ModelStore

HIDDEN, MLP, HEADS = 64, 96, 2


def tokens() -> list[str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return ["<s>", "</s>", *bytes_to_unicode().values(), "ab"]


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (len(tokens()), HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_v.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate.weight": (MLP, HIDDEN),
        "blk.0.ffn_up.weight": (MLP, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, MLP),
    }
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory):
    """A one-layer Llama in Q8_0 with a byte-level tokenizer that wants BOS."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens()))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens())
    writer.add_token_types([3, 3] + [1] * (len(tokens()) - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    for name, values in tensors().items():
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_is_converted_once_and_exactly(small_gguf, tmp_path):
    told: list[str] = []
    store = ModelStore(tmp_path, told.append)
    folder = store.folder(f"gguf:{small_gguf}")
    assert folder == tmp_path / "models" / store.fingerprint(f"gguf:{small_gguf}")
    kind = gguf.GGMLQuantizationType.Q8_0
    up = tensors()["blk.0.ffn_up.weight"]
    expected = gguf.dequantize(gguf.quantize(up, kind), kind)
    found = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert found.dtype.is_floating_point
    np.testing.assert_array_equal(found.numpy(), expected)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert store.folder(f"gguf:{small_gguf}") == folder
    assert store.tokenizer_folder(f"gguf:{small_gguf}") == folder
    assert len(told) == 1
    assert "dequantising 0M parameters" in told[0]


def test_a_converted_tokenizer_adds_the_bos_that_its_file_asks_for(small_gguf, tmp_path):
    from transformers import AutoTokenizer

    folder = ModelStore(tmp_path).tokenizer_folder(f"gguf:{small_gguf}")
    assert not list(folder.glob("*.safetensors"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("hi").input_ids == [0, *tokenizer("hi", add_special_tokens=False).input_ids]


@pytest.mark.parametrize("missing", [1, 5000])
def test_a_gguf_cut_short_says_how_much_is_missing(small_gguf, tmp_path, missing):
    header = read_header(small_gguf)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(small_gguf.read_bytes()[: header.expected_size - missing])
    with pytest.raises(ModelError, match=rf"cut.gguf.*\({missing:,} missing\).*fetch it again"):
        ModelStore(tmp_path / "cache").folder(f"gguf:{cut}")


@pytest.mark.parametrize("kept", [5, 20, 700])
def test_a_gguf_cut_inside_its_header_is_refused(small_gguf, tmp_path, kept):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(small_gguf.read_bytes()[:kept])
    with pytest.raises(ModelError, match=f"ends inside its header, after {kept} bytes"):
        ModelStore(tmp_path / "cache").folder(f"gguf:{cut}")


def test_what_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "page.gguf").write_text("<html>not found</html>")
    with pytest.raises(ModelError, match="expected a GGUF file"):
        ModelStore(tmp_path).folder(f"gguf:{tmp_path / 'page.gguf'}")


def test_a_full_disk_is_named_before_the_work(small_gguf, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(StorageFullError, match=r"small.gguf.* needs .*STILLHOUSE_CACHE"):
        ModelStore(tmp_path).folder(f"gguf:{small_gguf}")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError('I/O error: Os { code: 28, message: "No space left on device" }'),
    ],
)
def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path, error):
    def build(partial):
        (partial / "weights").write_bytes(b"half")
        raise error

    with pytest.raises(StorageFullError, match=f"while writing {tmp_path / 'model'}.* Free some"):
        build_once(tmp_path / "model", build)
    assert [path.name for path in tmp_path.iterdir()] == ["model.lock"]


def test_what_a_killed_build_left_is_not_used(tmp_path):
    kept = []

    def interrupted(partial):
        (partial / "old").touch()
        kept.append(partial)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "model", interrupted)
    assert not (tmp_path / "model").exists()
    kept[0].mkdir()  # as a kill would have left it
    (kept[0] / "old").touch()
    folder = build_once(tmp_path / "model", lambda partial: (partial / "new").touch())
    assert [path.name for path in folder.iterdir()] == ["new"]


def test_of_two_builders_one_builds_and_the_other_waits(tmp_path):
    started, go, waited, built = threading.Event(), threading.Event(), threading.Event(), []

    def build(partial):
        built.append(partial)
        started.set()
        assert go.wait(10)
        (partial / "weights").touch()

    first = threading.Thread(target=build_once, args=(tmp_path / "model", build))
    second = threading.Thread(target=build_once, args=(tmp_path / "model", build, waited.set))
    first.start()
    assert started.wait(10)
    second.start()
    assert waited.wait(10)
    go.set()
    first.join(10)
    second.join(10)
    assert len(built) == 1
    assert (tmp_path / "model" / "weights").exists()


def local_model(tmp_path, config=None, **files):
    folder = tmp_path / "local"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return folder


def test_a_local_safetensors_folder_is_used_where_it_lies(tmp_path):
    folder = local_model(tmp_path, model__safetensors="weights")
    assert ModelStore(tmp_path / "cache").folder(str(folder)) == folder


def test_pickled_weights_are_refused(tmp_path):
    folder = local_model(tmp_path, pytorch_model__bin="pickle")
    with pytest.raises(ModelError, match=r"expected safetensors .* found only pytorch_model.bin"):
        ModelStore(tmp_path).folder(str(folder))


@pytest.mark.parametrize(
    "auto_map", [{"AutoModelForCausalLM": "modeling_odd.Odd"}, ["modeling_odd.Odd"]]
)
def test_foreign_code_is_refused(tmp_path, auto_map):
    config = {"model_type": "odd", "auto_map": auto_map}
    folder = local_model(tmp_path, config, model__safetensors="weights")
    with pytest.raises(ModelError, match=r"auto_map.*modeling_odd.Odd.*never trusts remote code"):
        ModelStore(tmp_path).folder(str(folder))


def test_a_missing_shard_is_named(tmp_path):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    folder = local_model(tmp_path)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").touch()
    with pytest.raises(ModelError, match=r"1 missing, the first model-2.safetensors"):
        ModelStore(tmp_path).folder(str(folder))


@pytest.mark.parametrize("index", [{}, {"weight_map": ["model-1.safetensors"]}, {"weight_map": {}}])
def test_an_index_without_its_map_is_refused(tmp_path, index):
    folder = local_model(tmp_path)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"expected a weight_map of tensors to files in .*, found"):
        ModelStore(tmp_path).folder(str(folder))


def test_a_folder_without_weights_or_without_a_config_is_refused(tmp_path):
    folder = local_model(tmp_path)
    with pytest.raises(ModelError, match=r"expected model.safetensors in .*, found none"):
        ModelStore(tmp_path).folder(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"expected config.json"):
        ModelStore(tmp_path).folder(str(folder))


def test_a_missing_folder_and_an_adapter_are_no_models(tmp_path):
    with pytest.raises(ModelError, match="expected a folder at"):
        ModelStore(tmp_path).folder(str(tmp_path / "none"))
    with pytest.raises(ModelError, match="expected a whole model, found an adapter"):
        ModelStore(tmp_path).folder(f"peft:{tmp_path}")


def test_a_hub_model_that_is_neither_cached_nor_reachable_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    ref = f"hf:org/name@{'0' * 40}"
    with pytest.raises(ModelError, match=r"not in the hub cache .* could not be downloaded"):
        ModelStore(tmp_path).folder(ref)


def test_a_hub_snapshot_is_used_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "f" * 40
    snapshots = tmp_path / "hub" / "models--org--name" / "snapshots"
    snapshots.mkdir(parents=True)
    local_model(tmp_path, model__safetensors="weights").rename(snapshots / commit)
    assert ModelStore(tmp_path).folder(f"hf:org/name@{commit}") == snapshots / commit


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "here"))
    assert default_cache_root() == tmp_path / "here"
    monkeypatch.delenv("STILLHOUSE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_root() == tmp_path / "stillhouse"
    assert cache_folder.default_cache_root() == ModelStore().cache_root
