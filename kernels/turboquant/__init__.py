"""TurboQuant (arXiv:2504.19874): vectors to a few bits a coordinate and one float16 scalar.

Beside it what it is compared with: PolarQuant, plain 8-bit floats, and a split of the channels.
"""

from stillhouse.kernels.turboquant.balance import (
    GROUP_BITS,
    BalancedBasis,
    ChannelGroup,
    GroupChoice,
    GroupCount,
    balance,
    choose_groups,
    expected_cost,
    group_curve,
)
from stillhouse.kernels.turboquant.codebook import (
    SUPPORTED_BITS,
    Codebook,
    distortion,
    gaussian_codebook,
    sphere_codebook,
)
from stillhouse.kernels.turboquant.codec import (
    COORDINATE_LAWS,
    SCALAR_KINDS,
    CoordinateLaw,
    MseCodec,
    NotFiniteError,
    PackedVectors,
    ScalarKind,
)
from stillhouse.kernels.turboquant.contract import (
    VectorCodec,
    join,
    map_tensors,
    nbytes_of,
    tensors_of,
)
from stillhouse.kernels.turboquant.fitted import (
    FittedCodec,
    FittedScalar,
    HeadFit,
    fit_heads,
    in_columns,
)
from stillhouse.kernels.turboquant.fp8 import Fp8Codec, Fp8Vectors
from stillhouse.kernels.turboquant.half import HalfCodec, HalfVectors, to_half
from stillhouse.kernels.turboquant.packing import pack, packed_bytes, unpack
from stillhouse.kernels.turboquant.polar import PolarCodec, PolarVectors
from stillhouse.kernels.turboquant.prod import PROD_BITS, ProdCodec, ProdVectors
from stillhouse.kernels.turboquant.rotation import Rotation
from stillhouse.kernels.turboquant.sketch import SKETCH_KINDS, Sketch, SketchKind
from stillhouse.kernels.turboquant.split import SplitCodec, SplitVectors
from stillhouse.kernels.turboquant.uniform import UniformCodec, UniformVectors

__all__ = [
    "COORDINATE_LAWS",
    "GROUP_BITS",
    "PROD_BITS",
    "SCALAR_KINDS",
    "SKETCH_KINDS",
    "SUPPORTED_BITS",
    "BalancedBasis",
    "ChannelGroup",
    "Codebook",
    "CoordinateLaw",
    "FittedCodec",
    "FittedScalar",
    "Fp8Codec",
    "Fp8Vectors",
    "GroupChoice",
    "GroupCount",
    "HalfCodec",
    "HalfVectors",
    "HeadFit",
    "MseCodec",
    "NotFiniteError",
    "PackedVectors",
    "PolarCodec",
    "PolarVectors",
    "ProdCodec",
    "ProdVectors",
    "Rotation",
    "ScalarKind",
    "Sketch",
    "SketchKind",
    "SplitCodec",
    "SplitVectors",
    "UniformCodec",
    "UniformVectors",
    "VectorCodec",
    "balance",
    "choose_groups",
    "distortion",
    "expected_cost",
    "fit_heads",
    "gaussian_codebook",
    "group_curve",
    "in_columns",
    "join",
    "map_tensors",
    "nbytes_of",
    "pack",
    "packed_bytes",
    "sphere_codebook",
    "tensors_of",
    "to_half",
    "unpack",
]
