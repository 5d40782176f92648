"""The mse codec on a GPU: one Triton kernel that encodes and one that decodes.

Per vector of KV head h, with g = h, or 0 where all heads share one map: z = x - mean_g,
y = matrix_g z, norm = ‖y‖, the index of each √D y_j / norm as in `MseCodec.encode`, packed as in
`packing`, and one float16 scalar. Decode is scalar · back_g^T c / √D + mean_g. All arithmetic is
float32; a vector is read once and never leaves the chip in between.

What is not finite: no vector is refused here, because looking would make the host wait. A vector
with a NaN or an infinity, or whose scalar exceeds float16, stores a scalar that is not finite and
decodes to NaN in every coordinate; the zero vector stores 0, and so does a norm below 2^-25.

This module imports triton; `stillhouse.kernels.turboquant` does not import this module. Importing
it needs no GPU; calling it needs CUDA tensors, or the interpreter (TRITON_INTERPRET=1, set before
triton is imported) for CPU tensors.

Shape suffixes: B batch, H KV heads, T tokens, D head size, P packed bytes, N padded columns (see
`triton_kernels`), G groups that have a map of their own (1 or H).
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from stillhouse.kernels.turboquant.codec import SCALAR_KINDS, ScalarKind
from stillhouse.kernels.turboquant.packing import packed_bytes
from stillhouse.kernels.turboquant.triton_kernels import (
    decode_kernel,
    decode_options,
    encode_kernel,
    encode_options,
    run_columns,
)

TRITON_BITS = (1, 2, 3, 4, 5)
MAX_HEAD_DIM = 256

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class TritonTables:
    """What both kernels read, all float32 and contiguous on one device; build once a codec.

    matrix_GDN: the map's rows in padded columns. back_GND: the map back. mean_GD: None for none.
    """

    head_dim: int
    bits: int
    matrix_GDN: Tensor
    back_GND: Tensor
    mean_GD: Tensor | None
    boundaries: Tensor
    centroids: Tensor

    @classmethod
    def build(
        cls,
        matrix_GDD: Tensor,
        boundaries: Tensor,
        centroids: Tensor,
        bits: int,
        *,
        back_GDD: Tensor | None = None,
        mean_GD: Tensor | None = None,
    ) -> "TritonTables":
        """Tables on the device of `matrix_GDD`, where all arguments lie, of any float dtype.

        matrix_GDD: y = matrix_g z; [D, D] stands for one group. back_GDD: z = y @ back_g, as
        `Rotation.rotate_back`; None for a rotation (back = matrix), else the inverse transposed.
        boundaries: [2^bits - 1], ascending. centroids: [2^bits]. mean_GD: subtracted before
        encoding, added after decoding. ValueError for bits outside 1…5, a head size that is no
        multiple of 8 in 8…256, or shapes that do not fit.
        """
        matrix_GDD = matrix_GDD.reshape(-1, *matrix_GDD.shape[-2:])
        back_GDD = matrix_GDD if back_GDD is None else back_GDD.reshape(-1, *back_GDD.shape[-2:])
        groups, dim = matrix_GDD.shape[0], matrix_GDD.shape[-1]
        mean_GD = None if mean_GD is None else mean_GD.reshape(-1, mean_GD.shape[-1])
        if bits not in TRITON_BITS or dim % 8 or not 8 <= dim <= MAX_HEAD_DIM:
            raise ValueError(
                f"expected bits in {TRITON_BITS} and a head size that is a multiple of 8 up to "
                f"{MAX_HEAD_DIM}, found {bits} bits and {dim}; encode others with PyTorch"
            )
        _require_shape("matrix", matrix_GDD, (groups, dim, dim))
        _require_shape("map back", back_GDD, (groups, dim, dim))
        _require_shape("boundaries", boundaries, (2**bits - 1,))
        _require_shape("centroids", centroids, (2**bits,))
        if mean_GD is not None:
            _require_shape("mean", mean_GD, (groups, dim))
            mean_GD = mean_GD.float().contiguous()
        return cls(
            dim,
            bits,
            pad_runs(matrix_GDD.float().mT),
            pad_runs(back_GDD.float().mT).mT.contiguous(),
            mean_GD,
            boundaries.float().contiguous(),
            centroids.float().contiguous(),
        )

    @property
    def groups(self) -> int:
        """G: 1 where all heads share one map, else the number of KV heads."""
        return self.matrix_GDN.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tables lie."""
        return self.matrix_GDN.device

    @property
    def nbytes(self) -> int:
        """Bytes of the storage behind all tables."""
        tables = (self.matrix_GDN, self.back_GND, self.boundaries, self.centroids, self.mean_GD)
        return sum(table.untyped_storage().nbytes() for table in tables if table is not None)


def encode(x_BHTD: Tensor, tables: TritonTables, scalar: ScalarKind) -> tuple[Tensor, Tensor]:
    """Indices, uint8 [B, H, T, P], and scalars, float16 [B, H, T], both contiguous.

    x_BHTD: float32/float16/bfloat16 with any strides (a last axis that is not contiguous is copied
    first). [T, D] is one head, [H, T, D] one sequence, axes before B are more of it; the results
    have the same axes. ValueError for other dtypes or head sizes, another device than the tables',
    or heads that are not G where G > 1. Never waits for the device.
    """
    if scalar not in SCALAR_KINDS:
        raise ValueError(f"expected a scalar in {SCALAR_KINDS}, found {scalar!r}")
    if x_BHTD.dtype not in _DTYPES or x_BHTD.shape[-1] != tables.head_dim:
        raise ValueError(
            f"expected float32, float16 or bfloat16 [..., {tables.head_dim}], "
            f"found {x_BHTD.dtype} {list(x_BHTD.shape)}"
        )
    axes = x_BHTD.shape[:-1]
    x_BHTD = _four_axes(x_BHTD, tables)
    batch, heads, tokens, dim = x_BHTD.shape
    indices = x_BHTD.new_empty((*axes, packed_bytes(dim, tables.bits)), dtype=torch.uint8)
    scalars = x_BHTD.new_empty(axes, dtype=torch.float16)
    if not scalars.numel():
        return indices, scalars
    options = encode_options(dim, tables.bits, scalar, tables.mean_GD is not None)
    grid = (triton.cdiv(tokens, options["BLOCK"]), heads, batch)
    with torch.cuda.device_of(x_BHTD):
        encode_kernel[grid](
            x_BHTD,
            tables.matrix_GDN,
            tables.mean_GD,
            tables.boundaries,
            tables.centroids,
            indices,
            scalars,
            tokens,
            *x_BHTD.stride()[:3],
            *_group_strides(tables, tables.matrix_GDN),
            **options,
        )
    return indices, scalars


def decode(
    indices: Tensor, scalars: Tensor, tables: TritonTables, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`dtype` (float32, float16 or bfloat16) [B, H, T, D], contiguous, rounded once at the end.

    indices: uint8 [B, H, T, P] and scalars: float16 [B, H, T], such as a part of a longer cache;
    the same axes as `encode` gives, with any strides (a last axis of indices that is not contiguous
    is copied first). ValueError for other dtypes, shapes or devices. Never waits for the device.
    """
    width = packed_bytes(tables.head_dim, tables.bits)
    if indices.dtype != torch.uint8 or indices.shape != (*scalars.shape, width):
        raise ValueError(
            f"expected uint8 {[*scalars.shape, width]}, found {indices.dtype} {list(indices.shape)}"
        )
    if scalars.dtype != torch.float16 or dtype not in _DTYPES:
        raise ValueError(
            f"expected float16 scalars to float32, float16 or bfloat16 vectors, "
            f"found {scalars.dtype} to {dtype}"
        )
    out = indices.new_empty((*scalars.shape, tables.head_dim), dtype=dtype)
    indices = _four_axes(indices, tables)
    scalars = _four_axes(scalars[..., None], tables)
    batch, heads, tokens, _ = indices.shape
    if not out.numel():
        return out
    options = decode_options(tables.head_dim, tables.bits, tables.mean_GD is not None)
    grid = (triton.cdiv(tokens, options["BLOCK"]), heads, batch)
    with torch.cuda.device_of(out):
        decode_kernel[grid](
            indices,
            scalars,
            tables.back_GND,
            tables.mean_GD,
            tables.centroids,
            out,
            tokens,
            *indices.stride()[:3],
            *scalars.stride()[:3],
            *_group_strides(tables, tables.back_GND),
            **options,
        )
    return out


def pad_runs(columns_GDC: Tensor) -> Tensor:
    """[G, D, C] → contiguous [G, D, N]: the last axis as 8 runs, each with zeros at its end."""
    groups, dim, channels = columns_GDC.shape
    runs = columns_GDC.reshape(groups, dim, 8, channels // 8)
    padding = run_columns(channels) - channels // 8
    return torch.nn.functional.pad(runs, (0, padding)).reshape(groups, dim, -1).contiguous()


def _four_axes(tensor: Tensor, tables: TritonTables) -> Tensor:
    """A view [B, H, T, ·] with a contiguous last axis, checked against the tables."""
    tensor = tensor.detach()
    if tensor.device != tables.device:
        raise ValueError(f"expected tensors on {tables.device}, found one on {tensor.device}")
    if not tensor.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(f"expected tensors on a CUDA device, found {tensor.device}; use MseCodec")
    while tensor.ndim < 4:
        tensor = tensor[None]
    tensor = tensor.flatten(0, -4)
    if tables.groups not in (1, tensor.shape[1]):
        raise ValueError(
            f"expected {tables.groups} KV heads, one for each map, found {tensor.shape[1]}"
        )
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _group_strides(tables: TritonTables, matrix: Tensor) -> tuple[int, int]:
    """From one head's map to the next one's, and from its mean: 0 where all share them."""
    return (matrix.stride(0), tables.head_dim) if tables.groups > 1 else (0, 0)


def _require_shape(name: str, table: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(table.shape) != shape:
        raise ValueError(f"expected {name} {list(shape)}, found {list(table.shape)}")
