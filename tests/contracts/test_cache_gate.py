"""Guarantee 23 of README.md: a cache that spoils its model is not deployed."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from stillhouse.workers.models.store import ModelStore
from tests.contracts.tiny_run import stillhouse

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
MAX_KL = 0.1


@pytest.fixture(scope="module")
def biased(cache_root: Path, tmp_path_factory) -> Path:
    """toy:llama with a long bias in its key projections, as Qwen2 has: all keys share a vector far
    longer than what tells them apart, in the channels that rotate slowest."""
    source = ModelStore(cache_root).folder("toy:llama")
    plain = LlamaForCausalLM.from_pretrained(source)
    plain.config.attention_bias = True
    with torch.random.fork_rng():
        model = LlamaForCausalLM(plain.config)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(name.endswith("bias") for name in missing)
    half = model.model.layers[0].self_attn.head_dim // 2
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
                if "k_proj" in name:
                    parameter[half - 1 :: half] = 60.0
    folder = tmp_path_factory.mktemp("biased")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def test_a_bad_pair_of_model_and_format_is_refused_with_the_numbers(
    biased: Path, tmp_path: Path, cache_root: Path
) -> None:
    recipe = (
        "run", "tiny", f"runs_root={tmp_path}", f"models.target={biased}", "score.max_new_tokens=4",
        f"compress.max_kl={MAX_KL}",
    )  # fmt: skip
    done = stillhouse(cache_root, *recipe, "compress.calibrate=false")
    oblivious = json.loads((tmp_path / "tiny" / "report.json").read_text())
    assert done.code == 10, done.err
    kl = oblivious["cache"]["kl_mean"]
    assert kl > 2 * MAX_KL
    words = f"refused, not registered: kl_mean {kl:.4f} is over max_kl {MAX_KL}"
    assert words in " ".join(done.out.split())

    done = stillhouse(cache_root, *recipe)  # goes on at `compress`
    fitted = json.loads((tmp_path / "tiny" / "report.json").read_text())
    assert done.code == 0, done.err
    assert fitted["deployment"]["refused"] is None
    assert fitted["cache"]["kl_mean"] < MAX_KL / 2
    assert fitted["cache"]["bytes_per_token"] <= oblivious["cache"]["bytes_per_token"]
