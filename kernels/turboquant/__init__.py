"""TurboQuant (arXiv:2504.19874): vectors to a few bits a coordinate and one float16 scalar."""

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
from stillhouse.kernels.turboquant.packing import pack, packed_bytes, unpack
from stillhouse.kernels.turboquant.prod import PROD_BITS, ProdCodec, ProdVectors
from stillhouse.kernels.turboquant.rotation import Rotation
from stillhouse.kernels.turboquant.sketch import SKETCH_KINDS, Sketch, SketchKind

__all__ = [
    "COORDINATE_LAWS",
    "PROD_BITS",
    "SCALAR_KINDS",
    "SKETCH_KINDS",
    "SUPPORTED_BITS",
    "Codebook",
    "CoordinateLaw",
    "MseCodec",
    "NotFiniteError",
    "PackedVectors",
    "ProdCodec",
    "ProdVectors",
    "Rotation",
    "ScalarKind",
    "Sketch",
    "SketchKind",
    "distortion",
    "gaussian_codebook",
    "pack",
    "packed_bytes",
    "sphere_codebook",
    "unpack",
]
