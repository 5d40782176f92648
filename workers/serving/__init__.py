"""Serving from the packed cache: a plugin of vLLM, and the server around it.

`layout`, `step` and the layers know nothing of vLLM; `vllm_cpu` and `vllm_cuda` are its backends.
"""
