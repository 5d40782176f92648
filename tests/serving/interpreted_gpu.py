"""vLLM in one process, with the backend of a GPU on Triton's interpreter, or that of a CPU.

`python -m tests.serving.interpreted_gpu MODEL SETTINGS gpu|cpu` prints tokens and log-probabilities
of greedy answers as JSON. The environment says how: see `test_gpu_backend`.
"""

import json
import sys

import torch

from stillhouse.workers.serving.vllm_cuda import PackedCudaBackend, PackedCudaImpl

PROMPTS = [[5, 6, 7, 8] * 10, [9, 10, 11], [5, 6, 7, 8] * 10 + [12, 13]]


class InterpretedImpl(PackedCudaImpl):
    """All of the GPU's but the device."""

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        self.prepare(act_dtype, torch.device("cpu"))


class InterpretedBackend(PackedCudaBackend):
    """In the place of vLLM's for a CPU."""

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"

    @staticmethod
    def get_impl_cls() -> type[InterpretedImpl]:
        return InterpretedImpl


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    model, settings, kind = sys.argv[1:]
    load_general_plugins()
    if kind == "gpu":
        name = f"{InterpretedBackend.__module__}.{InterpretedBackend.__name__}"
        register_backend(AttentionBackendEnum.CPU_ATTN, name.replace("__main__", _NAME))
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
    how = SamplingParams(temperature=0, max_tokens=4, logprobs=1, ignore_eos=True, detokenize=False)
    found = []
    for answer in llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], how):
        [made] = answer.outputs
        logp = [
            entry[token].logprob for entry, token in zip(made.logprobs, made.token_ids, strict=True)
        ]
        found.append({"tokens": list(made.token_ids), "logp": logp})
    sys.stdout.write("\n" + json.dumps(found) + "\n")


_NAME = "tests.serving.interpreted_gpu"

if __name__ == "__main__":
    main()
