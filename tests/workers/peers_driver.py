"""Prints as JSON what transformers' quantised cache does, read as it is and read back.

A process of its own, with the peers' packages on its path: where HQQ is installed transformers
imports it, which no other test should pay for.
"""

import json
import sys

import torch
from transformers import LlamaConfig
from transformers.cache_utils import QuantizedCache

from stillhouse.workers.cache_quality.bench import bench
from stillhouse.workers.cache_quality.formats import parse_format
from stillhouse.workers.cache_quality.job import QualityJob
from stillhouse.workers.cache_quality.peers import ReadBackCache
from stillhouse.workers.models.language_model import load
from stillhouse.workers.models.store import ModelStore
from stillhouse.workers.protocols import ModelSpec

CONFIG = LlamaConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=1)
AXES = {("quanto", 4): 0, ("quanto", 2): 0, ("hqq", 4): 1, ("hqq", 3): 0, ("hqq", 2): 1}
TEXT = "The quick brown fox jumps over the lazy dog, twice. " * 3


def read_back(backend, bits):
    """Two calls of both caches."""
    axis = AXES[backend, bits]
    first, second = torch.randn(2, 1, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    ours = ReadBackCache(backend, CONFIG, bits)
    theirs = QuantizedCache(backend, CONFIG, bits, axis_key=axis, axis_value=axis)
    keys, values = ours.update(first, 2 * first, 0)
    nbytes = ours.nbytes
    raw, _ = theirs.update(first, 2 * first, 0)
    stored, _ = theirs.update(second, second, 0)
    longer, _ = ours.update(second[:, :, :1], second[:, :, :1], 0)
    return {
        "theirs_is_raw": torch.equal(raw, first),
        "ours_is_stored": torch.equal(keys, stored[:, :, :64]),
        "goes_on": torch.equal(longer[:, :, :64], keys) and longer.shape[2] == 65,
        "error": relative_error(keys, first),
        "value_error": relative_error(values, 2 * first),
        "nbytes": nbytes,
    }


def relative_error(x, original):
    """Root mean square."""
    return ((x - original).square().mean() / original.square().mean()).sqrt().item()


def refused():
    """HQQ packs groups by twos."""
    cache = ReadBackCache("hqq", CONFIG, 4)
    x = torch.randn(1, 3, 31, 64)
    try:
        cache.update(x, x, 0)
    except ValueError as error:
        return str(error)
    return None


def rows(folder):
    """The peers' rows for a model."""
    lm = load(ModelStore(), ModelSpec(folder))
    forms = [parse_format(name) for name in ("bf16", "quanto:4", "quanto:2", "hqq:4", "hqq:2")]
    job = QualityJob([TEXT], [], forms, window=64)
    return [row.as_json() for row in bench(lm, job, lambda *_: None).rows]


if __name__ == "__main__":
    found = {
        "caches": {f"{name}:{bits}": read_back(name, bits) for name, bits in AXES},
        "refused": refused(),
        "llama": rows(sys.argv[1]),
        "gemma": rows(sys.argv[2]),
    }
    sys.stdout.write(json.dumps(found))
