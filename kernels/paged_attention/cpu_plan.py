"""What all layers of a step share: who sees what, and room to work in.

Checked and laid out once a step; each layer then costs a third of the Python.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from stillhouse.kernels.paged_attention.cpu_spec import split_count
from stillhouse.kernels.paged_attention.refusals import places_of


class DecodePlan:
    """Of one token of each sequence, for layers with as many heads that see the same tokens.

    ranges: of each sequence the packed tokens [first, last) that it sees. raw: those in 16 bits,
    [first, last) of both parts (`cpu.RawTokens`). heads: of keys; group: queries of each. page:
    tokens of a page, 0 for records. table_BW: int32, the page of each `page` tokens of a sequence,
    anything where no range is; None for records. It is read by address: do not change it.

    One call at a time may use a plan. ValueError for ranges and pages that cannot be.
    """

    def __init__(
        self,
        ranges: Sequence[tuple[int, int]],
        raw: Sequence[tuple[int, int, int, int]],
        heads: int,
        group: int,
        page: int = 0,
        table_BW: Tensor | None = None,
    ) -> None:
        self.places = places_of(ranges, page, table_BW)
        self.raw_ends = _raw_ends(raw, len(ranges))
        self.shape = batch, _, _ = len(ranges), heads, group
        splits = max([1, *(split_count(*span) for span in ranges)])
        self.items = batch * heads * splits
        # ctypes' arrays are made faster than tensors.
        flat = [end for one, two in zip(ranges, raw, strict=True) for end in (*one, *two)]
        self._spans = (ctypes.c_int64 * len(flat))(*flat)
        self._done = (ctypes.c_int64 * (batch * heads))()
        self._no_offset = (ctypes.c_float * (batch * heads * group))()
        self._room = torch.empty(0, dtype=torch.float32, device="cpu")
        self.no_offset = ctypes.addressof(self._no_offset)
        table = self.places.table
        # In the order of `cpu_spec.PLAN_WORDS`.
        self.words = (
            ctypes.addressof(self._done), heads, self.items, splits,
            ctypes.addressof(self._spans),
            0 if table is None else table.data_ptr(),
            0 if table is None else 4 * table.stride(0),
        )  # fmt: skip

    def require(self, shape: tuple[int, ...], page: int) -> None:
        """ValueError unless it was made for queries [B, H, G, …] and such pages."""
        if self.shape != shape[:3] or self.places.page != page:
            raise ValueError(
                f"expected a plan for queries {list(shape[:3])} and pages of {page} tokens, found "
                f"one for {list(self.shape)} and {self.places.page}"
            )

    def room(self, size: int) -> Tensor:
        """float32 [size], to work in until the next layer."""
        if self._room.numel() < size:
            self._room = torch.empty(size, dtype=torch.float32, device="cpu")
        return self._room


def _raw_ends(raw: Sequence[tuple[int, int, int, int]], batch: int) -> tuple[int, int]:
    """Where the tokens end that are seen of both parts."""
    if len(raw) != batch:
        raise ValueError(f"expected raw ranges of {batch} sequences, found {len(raw)}")
    if any(ends[0] < 0 or ends[2] < 0 for ends in raw):
        raise ValueError(f"expected raw ranges from 0 on, found {list(raw)}")
    return max((ends[1] for ends in raw), default=0), max((ends[3] for ends in raw), default=0)
