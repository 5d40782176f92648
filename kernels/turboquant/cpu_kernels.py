"""The codec's loops for a CPU, compiled by numba at their first use and kept in its cache on disk.

A vector goes through registers and L1 from the map to the packed bytes; PyTorch would make a
dozen passes, each with a call that costs more than the arithmetic of a generated token's few
vectors. Loops are written so that the compiler vectorises them without reordering a sum; products
may fuse with sums. Launched by `cpu_codec`.

Shape suffixes: N vectors, H key/value heads, T tokens of one head, D head size, C coded channels,
G groups of heads with a map of their own (1 or H), P packed bytes; R channel groups, each a row
(channels, bits, first centroid, first boundary).
"""

import math

import numba
import numpy as np
from numba import types

NORM, CORRECTED, UNBIASED, LEAST_SQUARES = range(4)  # which scalar
_TINY = np.float32(1e-20)
_OVERFLOW = np.float32(65520)  # rounds to an infinity in float16


def _is_cacheable() -> bool:
    """Whether numba finds a folder to keep compiled code in."""
    try:
        numba.njit(cache=True)(_is_cacheable)
    except RuntimeError:
        return False
    return True


_CACHE = _is_cacheable()
_OPTIONS = {"cache": _CACHE, "nogil": True, "fastmath": {"contract"}, "error_model": "numpy"}
_DECODE = "void(uint8[:,::1], float32[::1], int64[:,::1], float32[::1], float32[:,::1])"


@numba.njit(**_OPTIONS)
def _nearest(u, index, boundaries):
    """How many boundaries lie strictly below each value."""
    for c in range(u.shape[0]):
        index[c] = 0
    for i in range(boundaries.shape[0]):
        edge = boundaries[i]
        for c in range(u.shape[0]):
            index[c] += np.uint8(u[c] > edge)


@numba.njit(**_OPTIONS)
def _factor(kind, u, near, weight):
    """What the norm is multiplied by."""
    if kind == NORM:
        return np.float32(1)
    inner, length, whole = np.float64(0), np.float64(0), np.float64(0)
    for c in range(u.shape[0]):
        inner += np.float64(weight[c]) * u[c] * near[c]
        length += np.float64(weight[c]) * near[c] * near[c]
        whole += np.float64(weight[c]) * u[c] * u[c]
    if kind == CORRECTED:
        return np.float32(math.sqrt(u.shape[0] / length))
    if kind == UNBIASED:
        return np.float32(whole / (inner if inner > _TINY else np.float64(_TINY)))
    return np.float32(inner / length)


@numba.njit(**_OPTIONS)
def _pack(index, bits, out):
    """`packing.pack` of one group of channels."""
    count = index.shape[0]
    low = bits - 1 if bits == 3 or bits == 5 else bits
    mask = (1 << low) - 1
    run = count * low // 8
    for j in range(run):
        out[j] = index[j] & mask
    for r in range(1, 8 // low):
        for j in range(run):
            out[j] |= np.uint8((index[r * run + j] & mask) << (r * low))
    if low != bits:
        eighth = count // 8
        for j in range(eighth):
            out[run + j] = 0
        for r in range(8):
            for j in range(eighth):
                out[run + j] |= np.uint8((index[r * eighth + j] >> low) << r)


@numba.njit(**_OPTIONS)
def _look_up(row, bits, book, scale, out):
    count = out.shape[0]
    low = bits - 1 if bits == 3 or bits == 5 else bits
    mask = (1 << low) - 1
    run = count * low // 8
    eighth = count // 8
    if low == bits:
        for r in range(8 // low):
            for j in range(run):
                out[r * run + j] = scale * book[(row[j] >> (r * low)) & mask]
        return
    # The high bit's plane has runs of an eighth: `low` of them make one of the low plane's.
    for e in range(8):
        shift, first = e // low * low, e % low * eighth
        for j in range(eighth):
            high = (row[run + j] >> e) & 1
            index = ((row[first + j] >> shift) & mask) | (high << low)
            out[e * eighth + j] = scale * book[index]


@numba.njit(**_OPTIONS)
def half_bits(value, room):
    """The bits of the nearest float16, ties to even; room: one float32, to look at bits."""
    room[0] = value
    bits = room.view(np.uint32)[0]
    sign, size = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
    if size > 0x7F800000:
        return np.uint16(sign | 0x7E00)  # no number
    if size >= 0x47800000:  # 65,536
        return np.uint16(sign | 0x7C00)
    if size < 0x38800000:  # 2^-14: steps of 2^-24
        return np.uint16(sign | np.uint32(np.rint(abs(np.float64(value)) * 16777216.0)))
    size += 0xFFF + ((size >> 13) & 1)
    return np.uint16(sign | ((size - 0x38000000) >> 13))


@numba.njit(**_OPTIONS)
def _room(groups_R4):
    """What `_encode_vector` works in: coordinates, indices, centroids; and a float to look at."""
    coded = groups_R4[:, 0].sum()
    y_C, index_C = np.empty(coded, np.float32), np.empty(coded, np.uint8)
    return y_C, index_C, np.empty(coded, np.float32), np.empty(1, np.float32)


@numba.njit(**_OPTIONS)
def _encode_vector(
    x_D, mean_D, map_DD, weight_D, groups_R4, centroids, boundaries, kind, room, out_P
):
    """Packs one vector; returns its scalar. map_DD: without rows for the identity."""
    y_C, index_C, near_C, _ = room
    coded = y_C.shape[0]
    if map_DD.shape[0] == 0:
        for c in range(coded):
            y_C[c] = x_D[c] - mean_D[c]
    else:
        for c in range(coded):
            y_C[c] = 0
        for d in range(x_D.shape[0]):
            z = x_D[d] - mean_D[d]
            for c in range(coded):
                y_C[c] += z * map_DD[d, c]
    square = np.float64(0)
    for c in range(coded):
        square += np.float64(y_C[c]) * y_C[c]
    norm = np.float32(math.sqrt(square))
    # float16 stores 0 for a norm this small; its quotient would overflow.
    to_unit = np.float32(math.sqrt(coded)) / norm if norm > _TINY else np.float32(0)
    for c in range(coded):
        y_C[c] *= to_unit
    start, place = 0, 0
    for r in range(groups_R4.shape[0]):
        channels, bits, centroid, boundary = groups_R4[r]
        u = y_C[start : start + channels]
        index = index_C[start : start + channels]
        _nearest(u, index, boundaries[boundary : boundary + 2**bits - 1])
        for c in range(channels):
            near_C[start + c] = centroids[centroid + index[c]]
        _pack(index, bits, out_P[place : place + channels * bits // 8])
        start += channels
        place += channels * bits // 8
    return norm * _factor(kind, y_C, near_C, weight_D)


@numba.njit(**_OPTIONS)
def _encode(
    x_ND, tokens, mean_GD, map_GDD, weight_GD, groups_R4, centroids, boundaries, kind, out_NP, out_N
):
    heads = mean_GD.shape[0]
    room = _room(groups_R4)
    lost = 0
    for n in range(x_ND.shape[0]):
        g = n // tokens % heads
        map_DD = map_GDD[g] if map_GDD.shape[0] else np.empty((0, 0), np.float32)
        scalar = _encode_vector(
            x_ND[n], mean_GD[g], map_DD, weight_GD[g], groups_R4, centroids, boundaries, kind,
            room, out_NP[n],
        )  # fmt: skip
        out_N[n] = half_bits(scalar, room[3])
        lost += not abs(scalar) < _OVERFLOW
    return lost


@numba.njit(**_OPTIONS)
def _store(
    x_THD, slots_T, mean_GD, map_GDD, weight_GD, groups_R4, centroids, boundaries, kind, packed,
    places, planes_L3, pages,
):  # fmt: skip
    room, row = _room(groups_R4), np.empty(packed, np.uint8)
    page_stride, head_stride, page_tokens, scalars, keeps = places
    lost = 0
    for t in range(x_THD.shape[0]):
        if slots_T[t] < 0:
            continue
        page, place = slots_T[t] // page_tokens, slots_T[t] % page_tokens
        for h in range(x_THD.shape[1]):
            g = h % mean_GD.shape[0]
            map_DD = map_GDD[g] if map_GDD.shape[0] else np.empty((0, 0), np.float32)
            scalar = _encode_vector(
                x_THD[t, h], mean_GD[g], map_DD, weight_GD[g], groups_R4, centroids, boundaries,
                kind, room, row,
            )  # fmt: skip
            if not abs(scalar) < _OVERFLOW:
                lost += 1
                if not keeps:
                    continue
            base = page * page_stride + h * head_stride
            for i in range(planes_L3.shape[0]):
                first, size, start = planes_L3[i]
                there = base + first + place * size
                for j in range(size):
                    pages[there + j] = row[start + j]
            bits = half_bits(scalar, room[3])
            pages[base + scalars + 2 * place] = bits & 0xFF
            pages[base + scalars + 2 * place + 1] = bits >> 8
    return lost


_FLOATS, _BYTES = types.CPointer(types.float32), types.CPointer(types.uint8)
_INTEGERS, _HALVES = types.CPointer(types.int64), types.CPointer(types.uint16)


@numba.cfunc(
    types.int64(
        _FLOATS, types.int64, types.int64, _INTEGERS, _FLOATS, _FLOATS, _FLOATS, _INTEGERS, _FLOATS,
        _FLOATS, _BYTES, _HALVES,
    ),
    cache=_CACHE,
)  # fmt: skip
def encode_rows(
    x, count, tokens, sizes, mean, maps, weight, groups, centroids, boundaries, out, scalars
):
    """`count` vectors, `tokens` of each head in turn, to packed rows and float16 scalars.

    Returns how many scalars float16 cannot hold, or are no numbers. sizes: heads with a mean of
    their own, D, heads with a map of their own (0: the identity), R, numbers of centroids and of
    boundaries, P, and which scalar. maps: [G, D, D], a column a channel, the coded ones first.
    """
    heads, dim, mapped, groups_count, books, edges, packed, kind = numba.carray(sizes, 8)
    return _encode(
        numba.carray(x, (count, dim)),
        tokens,
        numba.carray(mean, (heads, dim)),
        numba.carray(maps, (mapped, dim, dim)),
        numba.carray(weight, (heads, dim)),
        numba.carray(groups, (groups_count, 4)),
        numba.carray(centroids, books),
        numba.carray(boundaries, edges),
        kind,
        numba.carray(out, (count, packed)),
        numba.carray(scalars, count),
    )


@numba.cfunc(
    types.int64(
        _FLOATS, types.int64, types.int64, _INTEGERS, _INTEGERS, _FLOATS, _FLOATS, _FLOATS,
        _INTEGERS, _FLOATS, _FLOATS, _INTEGERS, _INTEGERS, _BYTES,
    ),
    cache=_CACHE,
)  # fmt: skip
def store_rows(
    x, count, rows, slots, sizes, mean, maps, weight, groups, centroids, boundaries, places,
    planes, pages,
):  # fmt: skip
    """Vectors [count, rows, D], tokens of `rows` heads, into half pages at slots; -1 is skipped.

    As `encode_rows`; what float16 cannot hold is counted, and stored only if asked. places: bytes
    from page to page and from head to head, tokens of a page, byte where its scalars begin, whether
    such vectors are stored, planes, bytes of all pages. planes: of each the first byte, bytes a
    row, byte of the packed vector.
    """
    heads, dim, mapped, groups_count, books, edges, packed, kind = numba.carray(sizes, 8)
    page, head, tokens, scalars, keeps, planes_count, total = numba.carray(places, 7)
    return _store(
        numba.carray(x, (count, rows, dim)),
        numba.carray(slots, count),
        numba.carray(mean, (heads, dim)),
        numba.carray(maps, (mapped, dim, dim)),
        numba.carray(weight, (heads, dim)),
        numba.carray(groups, (groups_count, 4)),
        numba.carray(centroids, books),
        numba.carray(boundaries, edges),
        kind,
        packed,
        (page, head, tokens, scalars, keeps),
        numba.carray(planes, (planes_count, 3)),
        numba.carray(pages, total),
    )


@numba.njit(_DECODE, **_OPTIONS)
def decode_rows(packed_NP, scale_N, groups_R4, centroids, out_NC):
    """Packed rows to centroid times scale, float32 [N, C]."""
    for n in range(packed_NP.shape[0]):
        start, place = 0, 0
        for r in range(groups_R4.shape[0]):
            channels, bits, centroid, _ = groups_R4[r]
            stop = place + channels * bits // 8
            row = packed_NP[n, place:stop]
            book = centroids[centroid : centroid + 2**bits]
            _look_up(row, bits, book, scale_N[n], out_NC[n, start : start + channels])
            start += channels
            place = stop
