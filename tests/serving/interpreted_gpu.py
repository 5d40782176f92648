"""vLLM in one process, with the backend of a GPU on Triton's interpreter, or that of a CPU.

`python -m tests.serving.interpreted_gpu MODEL SETTINGS gpu|cpu` prints the layers' backends, and
tokens and log-probabilities of greedy answers, as JSON. The environment says how: see
`test_gpu_backend`.
"""

import importlib
import json
import sys
from typing import Any
from unittest.mock import patch

import torch
import triton

PROMPTS = [[5, 6, 7, 8] * 10, [9, 10, 11], [5, 6, 7, 8] * 10 + [12, 13]]
BACKEND = "tests.serving.interpreted_backend.InterpretedBackend"


def use_gpu_backend() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    # vLLM for a CPU has a stand-in for Triton, whose kernels compute nothing.
    with patch.multiple("vllm.triton_utils", triton=triton, tl=triton.language):
        importlib.import_module("vllm.v1.attention.backends.triton_attn")
    register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND)


def backends(llm: Any) -> list[str]:
    """Of each layer, as it is after loading."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return [layer.attn_backend.__name__ for layer in layers.values()]


def answers(llm: Any) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    how = SamplingParams(temperature=0, max_tokens=4, logprobs=1, ignore_eos=True, detokenize=False)
    found = []
    for answer in llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], how):
        [made] = answer.outputs
        logp = [
            entry[token].logprob for entry, token in zip(made.logprobs, made.token_ids, strict=True)
        ]
        found.append({"tokens": list(made.token_ids), "logp": logp})
    return found


def main() -> None:
    from vllm import LLM
    from vllm.plugins import load_general_plugins

    model, settings, kind = sys.argv[1:]
    load_general_plugins()
    if kind == "gpu":
        use_gpu_backend()
    llm = LLM(
        model,
        dtype="float16",
        enforce_eager=True,
        max_model_len=128,
        max_num_batched_tokens=32,
        block_size=32,
        kv_cache_memory_bytes=1 << 22,
        skip_tokenizer_init=True,
        additional_config={"stillhouse": json.loads(settings)},
    )
    # vLLM's own store asks for a card's generation.
    with patch.object(torch.cuda, "get_device_capability", return_value=(8, 0)):
        found = {"backends": backends(llm), "answers": answers(llm)}
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
