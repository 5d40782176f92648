"""New keys and values into packed pages on a GPU: one Triton kernel, one launch a layer's step.

Per vector of a head z = map · (x - mean), rounded as its codec rounds, or x itself in fp8, and
written where pages hold it: the bytes are those of `codec.encode` and `write_vectors`, but where
sums in another order put a coordinate on the other side of a boundary. All arithmetic is float32.

What is not finite: no vector is refused here, because looking would make the host wait. A vector
with a NaN or an infinity, or whose scalar exceeds float16, stores a scalar that is not finite, or
NaN in fp8, which attention shows as NaN.

The host waits for nothing but the check of the slots, which `trusted` leaves out; with it a call
can be captured in a CUDA graph. Importing this module needs no GPU; calling it needs CUDA tensors,
or the interpreter (TRITON_INTERPRET=1) for CPU tensors.

Shape suffixes: T tokens, H key/value heads, D head size, C coded channels, S columns of one of 8
runs of them (see `turboquant.triton_kernels`), N pages, Y bytes of a half page.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from stillhouse.kernels.paged_attention.gpu import GpuCodec, head_stride
from stillhouse.kernels.paged_attention.gpu_configs import padded
from stillhouse.kernels.paged_attention.gpu_refusals import (
    require_codec,
    require_slots,
    require_store,
)
from stillhouse.kernels.paged_attention.pages import PageFormat, VectorFormat
from stillhouse.kernels.paged_attention.triton_store import store_kernel
from stillhouse.kernels.turboquant import FittedCodec, Fp8Codec, gaussian_codebook
from stillhouse.kernels.turboquant.triton_codec import pad_runs
from stillhouse.kernels.turboquant.triton_kernels import run_columns

_FEW = 4096  # vectors that large tiles would leave most processors without


@dataclass(frozen=True, slots=True)
class StoreShape:
    """What the store is compiled for, of keys or of values. kind: of the scalar, "" in fp8."""

    channels: int
    bits: int
    kind: str = ""
    mapped: bool = False
    mean: bool = False


def store_options(
    head_dim: int, page: int, key: StoreShape, value: StoreShape, *, few: bool, check: bool = False
) -> dict[str, Any]:
    """Keyword arguments of a launch of `store_kernel`; few: of small tiles, as decoding has."""
    options: dict[str, Any] = {
        "D": head_dim, "D_PAD": padded(head_dim), "PAGE": page, "CHUNK": 16,
        "BLOCK": _block(key, value, few), "CHECK": check, "debug": check,
        # Without a bound of registers ptxas aims at one more block an SM and spills for it.
        "num_warps": 4 if few else 8, "num_stages": 2, "maxnreg": 255, "enable_fp_fusion": True,
    }  # fmt: skip
    for name, half in (("KEY", key), ("VALUE", value)):
        options |= {
            f"{name}_C": half.channels, f"{name}_S": run_columns(half.channels),
            f"{name}_BITS": half.bits, f"{name}_KIND": half.kind,
            f"{name}_HAS_MAP": half.mapped, f"{name}_HAS_MEAN": half.mean,
        }  # fmt: skip
    return options


def _block(key: StoreShape, value: StoreShape, few: bool) -> int:
    """Tokens of a tile: fewer of many columns, which would spill."""
    run = max(run_columns(half.channels) for half in (key, value))
    if few:
        return 32 if run == 8 else 16  # ptxas keeps a stack for 16 tokens of 64 channels
    return 32 if run > 16 else 64


@dataclass(frozen=True, eq=False, slots=True)
class StoreTables:
    """What the kernel reads of a codec, float32 and contiguous on one device.

    matrix_HDN: the map's rows as N = 8 S columns, [1, …] where heads share it, None for the
    identity. mean_HD: what is subtracted, None for nothing. boundaries: [2^bits - 1]; centroids:
    [2^bits]; None in fp8. heads: None where any number is taken.
    """

    format: VectorFormat
    head_dim: int
    heads: int | None = None
    kind: str = ""
    matrix_HDN: Tensor | None = None
    mean_HD: Tensor | None = None
    boundaries: Tensor | None = None
    centroids: Tensor | None = None

    @classmethod
    def of(cls, codec: GpuCodec, device: torch.device | str) -> "StoreTables":
        """ValueError for a codec whose vectors the kernel does not write."""
        if codec.head_dim % 16 or not 64 <= codec.head_dim <= 256:
            raise ValueError(f"expected a head size of 64, 80, … 256, found {codec.head_dim}")
        format = require_codec(codec)
        if isinstance(codec, Fp8Codec):
            return cls(format, codec.head_dim)
        heads, mean_HD = None, None
        if isinstance(codec, FittedCodec):
            _require_even_weights(codec, format.channels)
            heads, map_HDD = codec.heads, codec.fit.map_HDD
            mean_HD = codec.fit.mean_HD if bool(codec.fit.mean_HD.any()) else None
        else:
            map_HDD = codec.rotation.matrix[None]
        book = gaussian_codebook(format.groups[0].bits)
        return cls(
            format,
            codec.head_dim,
            heads,
            codec.scalar,
            None
            if map_HDD is None
            else pad_runs(map_HDD[:, : format.channels].float().mT).to(device),
            None if mean_HD is None else mean_HD.float().contiguous().to(device),
            # Explicit dtypes: a serving engine builds models under a bfloat16 default dtype.
            torch.tensor(book.boundaries, dtype=torch.float32, device=device),
            torch.tensor(book.centroids, dtype=torch.float32, device=device),
        )

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """As the kernel takes them."""
        return (self.matrix_HDN, self.mean_HD, self.boundaries, self.centroids)

    @property
    def head_strides(self) -> tuple[int, int]:
        """Elements from a head's map to the next one's, and from its mean: 0 where all share it."""
        return head_stride(self.matrix_HDN), head_stride(self.mean_HD)

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        tables = (table for table in self.tensors if table is not None)
        return sum(table.untyped_storage().nbytes() for table in tables)

    @property
    def shape(self) -> StoreShape:
        """What the kernel is compiled for."""
        group, mapped = self.format.groups[0], self.matrix_HDN is not None
        return StoreShape(group.channels, group.bits, self.kind, mapped, self.mean_HD is not None)


class GpuStore:
    """Writes a layer's keys and values as vectors of two codecs.

    page: tokens of a page. device: of the tables, and so of all that is stored. check: bounds are
    checked in the kernel as well, slowly. ValueError for codecs whose vectors the kernel does not
    write.
    """

    def __init__(
        self,
        key: GpuCodec,
        value: GpuCodec,
        page: int,
        *,
        device: torch.device | str,
        check: bool = False,
    ) -> None:
        self.key, self.value = StoreTables.of(key, device), StoreTables.of(value, device)
        if key.head_dim != value.head_dim:
            raise ValueError(
                f"expected keys and values of one head size, found {key.head_dim} and "
                f"{value.head_dim}"
            )
        self.pages = PageFormat.of(self.key.format, self.value.format, page)
        # Where tensors lie that are made there: `cuda` is one of several.
        self.head_dim, self.device = key.head_dim, torch.empty(0, device=device).device
        if self.device.type != ("cpu" if triton.knobs.runtime.interpret else "cuda"):
            raise ValueError(f"expected a CUDA device, found {self.device}; use `cpu_store`")
        self._check = check

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        return self.key.nbytes + self.value.nbytes

    def store(
        self,
        key_THD: Tensor,
        value_THD: Tensor,
        keys_NHY: Tensor,
        values_NHY: Tensor,
        slots_T: Tensor,
        *,
        trusted: bool = False,
    ) -> None:
        """Encode tokens and write them at their slots, page · tokens + place, in place.

        key_THD, value_THD: float32, float16 or bfloat16, each vector contiguous. keys_NHY,
        values_NHY: uint8 pages (`HalfPage`), each contiguous. slots_T: int32 or int64, contiguous;
        -1 for a token that is not stored, and no slot twice. trusted: slots are not looked at.

        ValueError, before anything is written, for what does not fit.
        """
        require_store(self, (key_THD, value_THD), (keys_NHY, values_NHY), slots_T)
        if not trusted:
            require_slots(self.pages.tokens, (keys_NHY, values_NHY), slots_T)
        tokens, heads, dim = key_THD.shape
        if not tokens or not heads:
            return
        few = tokens * heads <= _FEW
        options = store_options(
            dim, self.pages.tokens, self.key.shape, self.value.shape, few=few, check=self._check
        )
        grid = (triton.cdiv(tokens, options["BLOCK"]), heads, 2)
        with torch.cuda.device_of(key_THD):
            store_kernel[grid](
                key_THD, *self.key.tensors, keys_NHY,
                value_THD, *self.value.tensors, values_NHY, slots_T,
                *key_THD.stride()[:2], *self.key.head_strides, *keys_NHY.stride()[:2],
                *value_THD.stride()[:2], *self.value.head_strides, *values_NHY.stride()[:2],
                tokens, min(keys_NHY.shape[0], values_NHY.shape[0]), **options,
            )  # fmt: skip


def _require_even_weights(codec: FittedCodec, channels: int) -> None:
    """Weights that are alike cancel in the scalar, and the kernel has none."""
    weight_HC = codec.fit.weight_HD[:, :channels]
    if not bool((weight_HC == weight_HC[:, :1]).all()):
        raise ValueError("expected weights alike in all coded channels, found several in a head")
