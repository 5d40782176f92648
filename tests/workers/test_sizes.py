"""The number of parameters, counted from headers: what an estimate rests on."""

from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from stillhouse.errors import ModelError
from stillhouse.workers.models import toy
from stillhouse.workers.models.language_model import load
from stillhouse.workers.models.size import parameters
from stillhouse.workers.models.store import ModelStore
from stillhouse.workers.protocols import ModelSpec
from tests.workers.small_gguf import write_small_gguf


def test_a_gguf_header_counts_elements_and_not_bytes(tmp_path):
    """A quantised tensor has fewer bytes than elements times two."""
    path = write_small_gguf(tmp_path / "small.gguf")
    assert parameters(f"gguf:{path}") == 3 * 64 + 7
    folder = tmp_path / "folder"
    folder.mkdir()
    path.rename(folder / path.name)
    assert parameters(str(folder)) == 3 * 64 + 7


def test_a_folder_counts_the_tensors_of_all_its_safetensors(tmp_path):
    first = {"a": torch.ones(2, 3, 5), "scalar": torch.tensor(1.0)}
    save_file(first, tmp_path / "model-1.safetensors", metadata={"format": "pt"})
    save_file({"b": torch.ones(11, dtype=torch.bfloat16)}, tmp_path / "model-2.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert parameters(str(tmp_path)) == 2 * 3 * 5 + 1 + 11


def test_a_model_folder_counts_what_the_model_has(model_folders, lm):
    tied = {p.data_ptr(): p.numel() for p in lm.model.parameters()}
    assert parameters(str(model_folders[lm.name])) == sum(tied.values())


def test_toys_by_hand():
    """Two layers each: query and output, key and value, then the three matrices of the MLP."""
    assert parameters("toy:llama") == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert parameters("toy:gemma") == 2 * (2 * 48 * 64 + 2 * 48 * 32 + 3 * 48 * 96)


@pytest.mark.models
@pytest.mark.parametrize("name", sorted(toy.TOYS))
def test_a_toy_has_that_many_in_the_matrices_of_its_layers(name, cache_root):
    layers = load(ModelStore(cache_root), ModelSpec(f"toy:{name}")).model.get_decoder().layers
    matrices = [p.numel() for p in layers.parameters() if p.ndim == 2]
    assert parameters(f"toy:{name}") == sum(matrices)


def safetensors(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


SMALL = safetensors(b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}') + bytes(24)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "found a file of 0"),
        (SMALL[:5], "found a file of 5"),
        (SMALL[:40], "a header of 57 bytes, found a file of 40"),
        (b"\xff" * 40, "found a file of 40"),
        (safetensors(b'{"a":'), "expected a header in JSON"),
        (safetensors(b'{"\xff": 1}'), "expected a header in JSON"),
        (safetensors(b"[" * 100_000), "expected a header in JSON"),
        (safetensors(b"[]"), "expected a JSON object as header, found list"),
        (safetensors(b'{"a": 7}'), "expected a shape of each tensor"),
        (safetensors(b'{"a": {"dtype": "F32"}}'), "expected a shape of each tensor, found KeyErr"),
        (safetensors(b'{"a": {"shape": ["x", 2]}}'), "expected a shape of each tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",
)
def test_damaged_safetensors_are_named_with_the_cure(tmp_path, content, found):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=rf"model\.safetensors: .*{found}.*fetch it again"):
        parameters(str(tmp_path))


@given(damage=st.lists(st.tuples(st.integers(0, 70), st.binary(max_size=3)), min_size=1))
def test_any_damage_to_safetensors_is_read_or_refused(tmp_path_factory, damage):
    folder, content = tmp_path_factory.mktemp("damaged"), bytearray(SMALL)
    for place, put in damage:
        content[place : place + 2] = put
    (folder / "model.safetensors").write_bytes(content)
    with suppress(ModelError):
        parameters(str(folder))


@pytest.mark.parametrize("ref", ["toy:lama", "nowhere/model", "gguf:nowhere.gguf", "what:x"])
def test_a_model_that_is_not_there_is_named(ref):
    with pytest.raises(ModelError, match=ref):
        parameters(ref)
