"""What vLLM calls in each of its processes (entry point `vllm.general_plugins`).

It may be called several times in a process, and where nothing of ours is served: then the backends
that it names are vLLM's own in all but name.
"""

_CPU = "stillhouse.workers.serving.vllm_cpu.PackedCpuBackend"
_CUDA = "stillhouse.workers.serving.vllm_cuda.PackedCudaBackend"


def register() -> None:
    """Names our attention backends; imports none of them."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, _CPU)
    register_backend(AttentionBackendEnum.CUSTOM, _CUDA)
