"""New keys or values into pages on a CPU: transformed, rounded, packed and written in one pass.

Shape suffixes: T tokens, H key/value heads, D head size, N pages, Y bytes of a half page.
"""

from functools import cache

import torch
from torch import Tensor

from stillhouse.kernels.paged_attention.cpu_calls import run_calls
from stillhouse.kernels.paged_attention.pages import FP8, HalfPage, write_vectors
from stillhouse.kernels.turboquant import FittedCodec, Fp8Codec, MseCodec
from stillhouse.kernels.turboquant.codec import NotFiniteError
from stillhouse.kernels.turboquant.cpu_codec import STORE_ROWS, RowPlaces
from stillhouse.kernels.turboquant.inputs import require_vectors

_LEAST = 8  # tokens that are worth a thread
PagedCodec = MseCodec | FittedCodec | Fp8Codec


def store_vectors(
    codec: PagedCodec,
    x_THD: Tensor,
    pages_NHY: Tensor,
    half: HalfPage,
    slots_T: Tensor,
    *,
    refuse: bool = True,
) -> None:
    """Encode tokens of a layer and write them at their slots, page · tokens + place, in place.

    The bytes are those of `codec.encode` and `write_vectors`. x_THD: float32, float16 or bfloat16
    on the CPU. pages_NHY: uint8, each half page contiguous. slots_T: int32 or int64; -1 for a token
    that is not stored. ValueError for what does not fit, before anything is written. A vector that
    float16 or fp8 cannot hold: NotFiniteError once all others are written; without `refuse` it is
    written so that what attends to it is no number.
    """
    _require(codec, x_THD, pages_NHY, half, slots_T)
    slots_T = slots_T.long()
    if isinstance(codec, Fp8Codec):
        kept_T = slots_T >= 0
        encode = codec.encode if refuse else codec.encode_reference
        codes = encode(x_THD[kept_T].transpose(0, 1)).codes
        write_vectors(pages_NHY, half, slots_T[kept_T], codes.contiguous(), None)
        return
    page, head, _ = pages_NHY.stride()
    count, heads, size = pages_NHY.shape
    places = _places(half, page, head, (count - 1) * page + (heads - 1) * head + size)
    step = max(-(-len(x_THD) // torch.get_num_threads()), _LEAST)
    calls, kept = codec.cpu_tables.store_calls(
        x_THD, slots_T, places, pages_NHY.data_ptr(), step, keeps=not refuse
    )
    lost = run_calls(STORE_ROWS, calls, kept) if calls else 0
    if lost and refuse:
        raise NotFiniteError(
            f"expected finite vectors with a norm that float16 holds (65,504), found {lost} of "
            f"{x_THD.shape[0] * heads} that are NaN, infinite or larger; their slots are as before"
        )


@cache
def _places(half: HalfPage, page: int, head: int, total: int) -> RowPlaces:
    planes = tuple((plane.first, plane.row_bytes, plane.packed) for plane in half.planes)
    return RowPlaces(page, head, half.tokens, half.scalars, planes, total)


def _require(
    codec: PagedCodec, x_THD: Tensor, pages_NHY: Tensor, half: HalfPage, slots_T: Tensor
) -> None:
    coded: tuple[tuple[int, int], ...] = ((codec.head_dim, FP8),)
    if not isinstance(codec, Fp8Codec):
        coded = tuple((group.channels, group.bits) for group in codec.coded_groups)
    wanted = tuple((group.channels, group.bits) for group in half.format.groups)
    if coded != wanted or (isinstance(codec, MseCodec) and codec.law != "gaussian"):
        raise ValueError(f"expected a codec of {wanted} (channels, bits), found one of {coded}")
    if isinstance(codec, FittedCodec):
        require_vectors(x_THD.movedim(0, -2), codec.head_dim, codec.heads)
    else:
        require_vectors(x_THD, codec.head_dim)
    heads = x_THD.shape[1] if x_THD.ndim == 3 else 0
    shape = (pages_NHY.shape[0], heads, half.nbytes)
    fits = pages_NHY.dtype == torch.uint8 and pages_NHY.shape == shape
    if not fits or pages_NHY.stride(-1) != 1:
        raise ValueError(
            f"expected half pages uint8 {list(shape)}, each contiguous, found {pages_NHY.dtype} "
            f"{list(pages_NHY.shape)} with strides {pages_NHY.stride()}"
        )
    if slots_T.dtype not in (torch.int32, torch.int64) or slots_T.shape != x_THD.shape[:1]:
        raise ValueError(
            f"expected integer slots [{x_THD.shape[0]}], found {slots_T.dtype} "
            f"{list(slots_T.shape)}"
        )
    for tensor in (x_THD, pages_NHY, slots_T):
        if not tensor.is_cpu:
            raise ValueError(f"expected tensors on the CPU, found one on {tensor.device}")
    limit = pages_NHY.shape[0] * half.tokens
    if slots_T.numel() and not -1 <= int(slots_T.min()) <= int(slots_T.max()) < limit:
        raise ValueError(f"expected slots from -1 to {limit - 1}, found {slots_T.tolist()}")
