"""Attention straight from packed pages: keys and values are decoded into registers only."""

from stillhouse.kernels.paged_attention.pages import (
    FP8,
    PAGE_TOKENS,
    HalfPage,
    PageFormat,
    RecordFormat,
    Records,
    VectorFormat,
    read_vectors,
    write_vectors,
)

__all__ = [
    "FP8",
    "PAGE_TOKENS",
    "HalfPage",
    "PageFormat",
    "RecordFormat",
    "Records",
    "VectorFormat",
    "read_vectors",
    "write_vectors",
]
