"""Which stored tokens a generated token sees, for the kernels that read them where they lie.

Shape suffixes: B sequences, H key/value heads, T tokens, D head size.
"""

from collections.abc import Sequence

from torch import Tensor

from stillhouse.workers.cache.rows import Rows


def raw_parts(rows: tuple[Rows, ...]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Keys and values of the sinks, and of recent tokens."""
    keys, values = rows
    recent = keys.recent_BHTD, values.recent_BHTD
    if keys.sinks is None or values.sinks is None:
        return (recent[0][:, :, :0], recent[1][:, :, :0]), recent
    return (keys.sinks.values_BHSD, values.sinks.values_BHSD), recent


def ranges(
    rows: Rows, visible: Sequence[tuple[int, int]]
) -> tuple[list[tuple[int, int]], list[tuple[int, int, int, int]]]:
    """Of each sequence the packed vectors, and the sinks and recent tokens, that its token sees.

    visible: the slots [first, end) of each sequence.
    """
    sinks = 0 if rows.sinks is None else rows.sinks.count
    recent = rows.recent_BHTD.shape[2]
    packed, raw, packed_length = [], [], rows.packed_length
    for (first, end), start in zip(visible, _pads_and_sinks(rows, len(visible)), strict=True):
        begin = max(first, start, rows.first_packed) - rows.first_packed
        packed.append((begin, packed_length))
        zero = start - sinks  # the slot of the first sink
        seen = max(first - zero, 0), min(end - zero, sinks)
        raw.append((*seen, min(max(max(first, start) - (end - recent), 0), recent), recent))
    return packed, raw


def _pads_and_sinks(rows: Rows, batch: int) -> list[int]:
    """The first slot of each sequence that is neither a pad nor a sink."""
    sinks = rows.sinks
    if sinks is None:
        return [0] * batch
    padding = [0] * batch if sinks.padding_B is None else sinks.padding_B.tolist()
    return [pads + sinks.count for pads in padding]
