"""The codec's Triton kernels as they ship: what `tools/kernel_report.py` compiles of them."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from stillhouse.kernels.turboquant import triton_kernels
from tools.compiled_kernel import SHARED_BYTES, Launch

BITS = (1, 2, 3, 4, 5)
HEAD_DIMS = (64, 80, 96, 128, 192, 256)
# Of the vectors. float16 and bfloat16 are both converted, by one instruction a number, and all else
# is the same code: the former is compiled at the fullest tiles only.
DTYPES = ("fp32", "bf16")
# The scalar changes a few instructions a row: all kinds are compiled at the fullest tiles.
USUAL_SCALAR, OTHER_SCALARS = "least_squares", ("norm", "corrected", "unbiased")
FULLEST = {(bits, dim) for bits in (4, 5) for dim in (128, 256)}

_TYPES = {
    "matrix_ptr": "*fp32",
    "mean_ptr": "*fp32",
    "boundary_ptr": "*fp32",
    "centroid_ptr": "*fp32",
    "index_ptr": "*u8",
    "scalar_ptr": "*fp16",
}


@dataclass(frozen=True, slots=True)
class CodecConfig:
    """One kernel: `scalar` is "" for decoding, `dtype` that of the vectors."""

    kernel: str
    arch: int
    bits: int
    head_dim: int
    dtype: str
    scalar: str
    has_mean: bool

    def launch(self) -> Launch:
        """The count T is never specialised."""
        if self.kernel == "encode":
            function, vectors = triton_kernels.encode_kernel, "x_ptr"
            given = triton_kernels.encode_options(
                self.head_dim, self.bits, self.scalar, self.has_mean
            )
        else:
            function, vectors = triton_kernels.decode_kernel, "out_ptr"
            given = triton_kernels.decode_options(self.head_dim, self.bits, self.has_mean)
        absent = {} if self.has_mean else {"mean_ptr": None}
        types = {**_TYPES, vectors: f"*{self.dtype}"}
        return Launch(function, given | absent, types, frozenset({"T"}))


def shipped() -> Iterator[CodecConfig]:
    """What the launchers use: every head size and number of bits, flags at the fullest."""
    for arch, bits, dim in itertools.product(SHARED_BYTES, BITS, HEAD_DIMS):
        for dtype in DTYPES:
            yield CodecConfig("encode", arch, bits, dim, dtype, USUAL_SCALAR, True)
            yield CodecConfig("decode", arch, bits, dim, dtype, "", True)
        if (bits, dim) in FULLEST:
            yield CodecConfig("encode", arch, bits, dim, "fp16", USUAL_SCALAR, True)
            yield CodecConfig("decode", arch, bits, dim, "fp16", "", True)
            for scalar in OTHER_SCALARS:
                yield CodecConfig("encode", arch, bits, dim, "bf16", scalar, True)
            yield CodecConfig("encode", arch, bits, dim, "bf16", USUAL_SCALAR, False)
            yield CodecConfig("decode", arch, bits, dim, "bf16", "", False)
