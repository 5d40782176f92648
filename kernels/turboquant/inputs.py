"""What every codec asks of the vectors it is given.

Shape suffixes: D head size, ... any leading axes.
"""

import torch
from torch import Tensor

INPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def require_vectors(x_D: Tensor, head_dim: int, heads: int | None = None) -> None:
    """ValueError unless `x_D` is float32, float16 or bfloat16 [..., head_dim].

    heads: what the axis before the last but one, [..., H, T, D], must be; None for any shape.
    """
    of_heads = heads is None or (x_D.ndim >= 3 and x_D.shape[-3] == heads)
    if x_D.dtype not in INPUT_DTYPES or x_D.shape[-1:] != (head_dim,) or not of_heads:
        wanted = f"[..., {head_dim}]" if heads is None else f"[..., {heads}, T, {head_dim}]"
        raise ValueError(
            f"expected float32, float16 or bfloat16 {wanted}, found {x_D.dtype} {list(x_D.shape)}"
        )
