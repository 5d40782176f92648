"""Queries of a chunk as the rows of a product, the same for every kernel.

Shape suffixes: B sequences, T tokens of the chunk, Q query heads, H key/value heads, M rows, row
t·G + g of token t; D head size.
"""

from torch import Tensor


def rows_of_chunk(query_BTQD: Tensor, heads: int) -> Tensor:
    """[B, H, M, D] of a chunk's queries."""
    batch, tokens, queries, dim = query_BTQD.shape
    query = query_BTQD.reshape(batch, tokens, heads, queries // heads, dim).transpose(1, 2)
    rows: Tensor = query.reshape(batch, heads, tokens * (queries // heads), dim)
    return rows


def chunk_of_rows(out_BHMD: Tensor, group: int) -> Tensor:
    """[B, T, Q, D]: the inverse of `rows_of_chunk`."""
    batch, heads, rows, dim = out_BHMD.shape
    out = out_BHMD.view(batch, heads, rows // group, group, dim).transpose(1, 2)
    chunk: Tensor = out.reshape(batch, rows // group, heads * group, dim)
    return chunk
