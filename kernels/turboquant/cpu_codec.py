"""The mse and the fitted codec on a CPU: one compiled loop that encodes and one that decodes.

The bytes are those of the PyTorch reference, ties aside: sums in another order may put a coordinate
within 1e-5 of a boundary on its other side, and a scalar on the next float16.

Imported by the codecs at their first call on CPU tensors, since it loads numba.

Shape suffixes: B batch, H key/value heads, T tokens, D head size, C coded channels, G groups of
heads with a map of their own (1 or H), P packed bytes, R channel groups.
"""

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.kernels.turboquant import cpu_kernels
from stillhouse.kernels.turboquant.balance import ChannelGroup
from stillhouse.kernels.turboquant.codec import PackedVectors
from stillhouse.kernels.turboquant.packing import packed_bytes

_KINDS = {
    "norm": cpu_kernels.NORM,
    "corrected": cpu_kernels.CORRECTED,
    "unbiased": cpu_kernels.UNBIASED,
    "least_squares": cpu_kernels.LEAST_SQUARES,
}
Array = np.ndarray[Any, Any]
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64
_ENCODE = ctypes.CFUNCTYPE(_LONG, _POINTER, _LONG, _LONG, *[_POINTER] * 9)(
    cpu_kernels.encode_rows.address
)
STORE_ROWS: int = cpu_kernels.store_rows.address  # see `CpuTables.store_calls`


@dataclass(frozen=True, slots=True)
class RowPlaces:
    """Where the rows of a packed vector lie in pages of tokens, all in bytes.

    page, head: from one page, and one head of it, to the next. scalars: where a page's begin.
    planes: first byte of the page, bytes a row, byte of the packed vector. total: of all pages.
    """

    page: int
    head: int
    tokens: int
    scalars: int
    planes: tuple[tuple[int, int, int], ...]
    total: int


@dataclass(frozen=True, slots=True)
class CpuTables:
    """What the loops read, float32 and contiguous; views of the codec's tables where they can be.

    map_GDD: a column a channel, the coded ones first; G = 0 for the identity. groups_R4: channels,
    bits, first centroid and first boundary of each coded group. sizes: as `encode_rows` has them.
    pointers: to sizes and the others, in its order.
    """

    mean_GD: Array
    map_GDD: Array
    weight_GD: Array
    groups_R4: Array
    centroids: Array
    boundaries: Array
    sizes: Array
    coded: int
    packed: int
    pointers: tuple[Any, ...]

    @classmethod
    def build(
        cls,
        map_GDD: Tensor | None,
        mean_GD: Tensor,
        weight_GD: Tensor,
        groups: Sequence[ChannelGroup],
        books: Sequence[tuple[Tensor, Tensor]],
        scalar: str,
    ) -> "CpuTables":
        """map_GDD: y = map_g z. books: centroids and boundaries of each group."""
        rows, centroids, boundaries = [], 0, 0
        for group, (centroid, boundary) in zip(groups, books, strict=True):
            rows.append((group.channels, group.bits, centroids, boundaries))
            centroids += centroid.numel()
            boundaries += boundary.numel()
        columns_GDD = mean_GD.new_empty((0, 0, 0)) if map_GDD is None else map_GDD.mT
        all_centroids, all_boundaries = map(_joined, zip(*books, strict=True))
        arrays = {
            "mean_GD": _floats(mean_GD),
            "map_GDD": _floats(columns_GDD),
            "weight_GD": _floats(weight_GD),
            "groups_R4": np.array(rows, dtype=np.int64),
            "centroids": _floats(all_centroids),
            "boundaries": _floats(all_boundaries),
        }
        packed = sum(packed_bytes(group.channels, group.bits) for group in groups)
        sizes = np.array(
            (*mean_GD.shape, len(columns_GDD), len(rows), centroids, boundaries, packed,
             _KINDS[scalar]), dtype=np.int64,
        )  # fmt: skip
        coded = sum(group.channels for group in groups)
        # ctypes objects, made once: a generated token's few vectors take less time than these.
        pointers = tuple(ctypes.c_void_p(x.ctypes.data) for x in (sizes, *arrays.values()))
        return cls(**arrays, sizes=sizes, coded=coded, packed=packed, pointers=pointers)

    def encode(self, x_D: Tensor) -> PackedVectors:
        """CPU vectors [..., H, T, D] of any float dtype; any leading axes where heads share a map.

        NotFiniteError for what float16 cannot hold.
        """
        axes = x_D.shape[:-1]
        indices = torch.empty((*axes, self.packed), dtype=torch.uint8, device="cpu")
        scalars = torch.empty(axes, dtype=torch.float16, device="cpu")
        packed = PackedVectors(indices, scalars)
        count = scalars.numel()
        if not count:
            return packed
        x_D = x_D.detach().float().contiguous()
        lost = _ENCODE(
            x_D.data_ptr(),
            count,
            axes[-1] if len(self.mean_GD) > 1 else 1,
            *self.pointers,
            indices.data_ptr(),
            scalars.data_ptr(),
        )
        if lost:
            packed.require_finite()
        return packed

    def store_calls(
        self,
        x_THD: Tensor,
        slots_T: Tensor,
        places: RowPlaces,
        address: int,
        step: int,
        keeps: bool,
    ) -> tuple[list[tuple[int, ...]], object]:
        """Arguments of `STORE_ROWS` for `step` tokens each, and what they point to.

        Encodes tokens and writes them at their slots, page · tokens + place; -1 is skipped. x_THD:
        CPU vectors of any float dtype. slots_T: int64. address: of the first page. Its results add
        up to how many float16 cannot hold; keeps: whether these are written, too.
        """
        x_THD, slots_T = x_THD.detach().float().contiguous(), slots_T.contiguous()
        numbers = (places.page, places.head, places.tokens, places.scalars, keeps)
        ends = (_LONG * 7)(*numbers, len(places.planes), places.total)
        flat = [number for plane in places.planes for number in plane]
        planes = (_LONG * len(flat))(*flat)
        count, heads, dim = x_THD.shape
        tables = [pointer.value for pointer in self.pointers]
        last = (*tables, ctypes.addressof(ends), ctypes.addressof(planes), address)
        x, slots = x_THD.data_ptr(), slots_T.data_ptr()
        calls = [
            (x + 4 * at * heads * dim, min(step, count - at), heads, slots + 8 * at, *last)
            for at in range(0, count, step)
        ]
        return calls, (x_THD, slots_T, ends, planes)

    def decode(self, indices_P: Tensor, scale: Tensor) -> Tensor:
        """float32 [..., C]: centroids of packed rows [..., P], each times its row's scale [...]."""
        out_C = torch.empty((*scale.shape, self.coded), dtype=torch.float32, device="cpu")
        if scale.numel():
            cpu_kernels.decode_rows(
                indices_P.contiguous().view(-1, self.packed).numpy(),
                scale.contiguous().view(-1).numpy(),
                self.groups_R4,
                self.centroids,
                out_C.view(-1, self.coded).numpy(),
            )
        return out_C

    def __deepcopy__(self, _memo: object) -> "CpuTables":
        """The same: nothing writes into tables, and the pointers are to these."""
        return self

    def bytes_apart(self, tables: Iterable[Tensor]) -> int:
        """Bytes of what is no view of these."""
        known = {table.data_ptr() for table in tables}
        arrays = (self.mean_GD, self.map_GDD, self.weight_GD, self.groups_R4)
        all_arrays = (*arrays, self.centroids, self.boundaries, self.sizes)
        return sum(array.nbytes for array in all_arrays if array.ctypes.data not in known)


def _floats(table: Tensor) -> Array:
    return table.detach().float().contiguous().numpy()


def _joined(tables: Sequence[Tensor]) -> Tensor:
    return tables[0] if len(tables) == 1 else torch.cat(tuple(tables))
