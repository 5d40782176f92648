"""The backend of a GPU in the place of a CPU's: vLLM imports it by its name."""

import torch

from stillhouse.workers.serving.vllm_cuda import PackedCudaBackend, PackedCudaImpl


class InterpretedImpl(PackedCudaImpl):
    """All of the GPU's but the device."""

    @staticmethod
    def device() -> torch.device:
        return torch.device("cpu")


class InterpretedBackend(PackedCudaBackend):
    """In the place of vLLM's for a CPU."""

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"

    @staticmethod
    def get_impl_cls() -> type[InterpretedImpl]:
        return InterpretedImpl
