"""What the Triton kernels share that read tiles: products over one tile of tier 1, or of originals.

They take columns as those of Mosaic do (`mosaic.py`): a group's query heads twice, the second half for what rounding
left of the weights. The `HALF` first tokens of a tile are in the low fields of a byte of values, and are looked at
before the others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels import levels as lv
from pallas_kernels import query as qr
from pallas_kernels.device_math import INTERPRETED, add_product, most, product, rounded
from pallas_kernels.originals import reference

TILE, HALF, QUARTER = tl.constexpr(lv.TILE), tl.constexpr(lv.TILE // 2), tl.constexpr(lv.TILE // 4)
LOWEST = tl.constexpr(reference.LOWEST)
CHANNELS = tl.constexpr(64)
"""That are multiplied at once: all of them would take too many registers."""

PARTS, NUMBERS = tl.constexpr(qr.PARTS), tl.constexpr(qr.NUMBERS)
UNIT_EXACT, SHIFT_EXACT = tl.constexpr(qr.UNIT_EXACT), tl.constexpr(qr.SHIFT_EXACT)


@triton.jit
def together(high, middle, low):
    """As `query.together`. (Not by `+`, see `device_math.add`.)"""
    unit = tl.full(high.shape, 256.0, tl.float32)
    return tl.fma(tl.fma(high.to(tl.float32), unit, middle.to(tl.float32)), unit, low.to(tl.float32))


@triton.jit
def query_parts(of, C: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr):
    """Channels from FIRST on of the three parts at `of` [PARTS, C, D]: [ROWS, C] each."""
    at = of + tl.arange(0, C)[None] * D + FIRST + tl.arange(0, ROWS)[:, None]
    return tl.load(at), tl.load(at + C * D), tl.load(at + 2 * C * D)


@triton.jit
def numbers_of(numbers, h, ROW: tl.constexpr, C: tl.constexpr):
    """A row of `query.Operands.numbers`: [1, C]."""
    return tl.load(numbers + (h * NUMBERS + ROW) * C + tl.arange(0, C))[None]


@triton.jit
def exact_queries(wide, numbers, h, C: tl.constexpr, D: tl.constexpr):
    """What `attend_tile_of_originals` takes of a head's queries: their parts, and unit and shift of a score."""
    q = query_parts(wide + (2 * h + 1) * PARTS * C * D, C, D, 0, D)
    return q, numbers_of(numbers, h, UNIT_EXACT, C), numbers_of(numbers, h, SHIFT_EXACT, C)


@triton.jit
def integer_dot(keys, parts):
    """`k.q` with the three bytes of a query: int8 [n, d], [d, C] thrice -> float32 [n, C]. Each product is exact."""
    high, middle, low = parts
    return together(
        tl.dot(keys, high, out_dtype=tl.int32), tl.dot(keys, middle, out_dtype=tl.int32),
        tl.dot(keys, low, out_dtype=tl.int32),
    )  # fmt: skip


@triton.jit
def in_two_halves(w, C: tl.constexpr):
    """As `query.in_two_halves`, of weights [n, C] whose columns repeat."""
    high = rounded(w)
    return tl.where((tl.arange(0, C) < C // 2)[None], high, rounded(w - high))


@triton.jit
def codes(packed, at, WIDTH: tl.constexpr):
    """Two's complement fields of bytes, from bit `at` on, as numbers that bfloat16 holds."""
    top: tl.constexpr = 2 ** (WIDTH - 1)
    if INTERPRETED:
        return (((packed.to(tl.int32) >> at) & (2 * top - 1)) ^ top).to(tl.float32) - top
    else:
        # A field's bits become the fraction of a number so large, 128, that their unit is its last place.
        fraction = ((packed.to(tl.int16) >> at) & (2 * top - 1)) ^ (top | 0x4300)
        return fraction.to(tl.bfloat16, bitcast=True) - tl.full((), 128 + top, tl.bfloat16)


@triton.jit
def no_values(C: tl.constexpr, D: tl.constexpr):
    """`sum w v` before any was read, of CHANNELS channels each."""
    zero = tl.zeros((CHANNELS, C), tl.float32)
    if D == CHANNELS:
        return (zero,)
    else:
        return zero, zero


@triton.jit
def load_values(plane, read, WIDTH: tl.constexpr, D: tl.constexpr):
    """A tile's values by the plane of WIDTH bits at `plane` [D, 128 WIDTH / 8], where it is to be `read` (1, or 0),
    CHANNELS channels each: [CHANNELS, HALF] int8, a byte for each token of a half, if need be twice."""
    size: tl.constexpr = TILE * WIDTH // 8
    of = plane + tl.arange(0, CHANNELS)[:, None] * size + (tl.arange(0, HALF) % size)[None]
    mask = tl.zeros((CHANNELS, HALF), tl.int32) < read
    if D == CHANNELS:
        return (tl.load(of, mask=mask, other=0),)
    else:
        return tl.load(of, mask=mask, other=0), tl.load(of + CHANNELS * size, mask=mask, other=0)


@triton.jit
def add_values(acc, packed, weights, WIDTH: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr):
    """To `acc`, CHANNELS channels each, a tile's values of `load_values`, times UNIT; `weights` [HALF, C] of each half
    of its tokens."""
    if D == CHANNELS:
        return (_add_channels(acc[0], packed[0], weights, WIDTH, UNIT),)
    else:
        return (
            _add_channels(acc[0], packed[0], weights, WIDTH, UNIT),
            _add_channels(acc[1], packed[1], weights, WIDTH, UNIT),
        )  # fmt: skip


@triton.jit
def _add_channels(acc, packed, weights, WIDTH: tl.constexpr, UNIT: tl.constexpr):
    first, second = weights
    if WIDTH == 4:
        low, high = codes(packed, 0, WIDTH), codes(packed, 4, WIDTH)
    else:  # two fields of 32 tokens are one half
        at = (tl.arange(0, HALF) // QUARTER * WIDTH).to(tl.int16)[None]
        low, high = codes(packed, at, WIDTH), codes(packed, at + 2 * WIDTH, WIDTH)
    return acc + add_product(product(low, first), high, second) * UNIT


@triton.jit
def store_channels(to, acc, C: tl.constexpr, D: tl.constexpr):
    """`acc` of `add_values` at `to` [D, C]."""
    at = tl.arange(0, CHANNELS)[:, None] * C + tl.arange(0, C)[None]
    for i in tl.static_range(D // CHANNELS):
        tl.store(to + i * CHANNELS * C + at, acc[i])


@triton.jit
def notes_of(key_scale, value_scale, nu, token):
    """Of tokens: the scales of their keys and values, and their shares of the tile's peak, [n] float32 each."""
    return (
        tl.load(key_scale + token).to(tl.float32), tl.load(value_scale + token).to(tl.float32),
        tl.load(nu + token).to(tl.float32),
    )  # fmt: skip


@triton.jit
def weigh(w, notes, C: tl.constexpr):
    """What tokens of weights `w` [n, C] and `notes_of` them add to the four sums of their tile, [n, C, 2, 2]: as
    `mosaic.sums_of`, to be added up together and stored by `store_sums`; and their weights times the values' scale, as
    `add_values` takes them."""
    key_scale, value_scale, share = notes
    scaled = w * value_scale[:, None]
    both = tl.where((tl.arange(0, C) < C // 2)[None], w, w * key_scale[:, None])
    return tl.join(tl.join(both, w * w), tl.join(both * share[:, None], scaled)), in_two_halves(scaled, C)


@triton.jit
def store_sums(stats, found, C: tl.constexpr):
    """At `stats` [4, C]."""
    to = stats + tl.arange(0, 4)[None] * C + tl.arange(0, C)[:, None]
    tl.store(to, tl.reshape(tl.sum(found, 0), (C, 4)))


@triton.jit
def next_chosen(chosen, after, N: tl.constexpr):
    """The first place beyond `after` where `chosen` [N]."""
    place = tl.arange(0, N)
    return tl.min(tl.where(chosen & (place > after), place, N), 0)


@triton.jit
def nothing(C: tl.constexpr, D: tl.constexpr):
    """What has been found of originals before any was read: `sum w v`, `sum w`, the squares of the longest key and
    value, and the largest score."""
    zero = tl.zeros((C,), tl.float32)
    return tl.zeros((D, C), tl.float32), zero, zero, zero, tl.full((C,), LOWEST, tl.float32)


@triton.jit
def attend_tile_of_originals(k, v, seen, parts, unit, shift, found, C: tl.constexpr):
    """Adds to `found` the tokens `seen` [n] of originals, `[n, d]` bfloat16 each, 0 where they were not read."""
    acc, total, longest_key, longest_value, peak = found
    high, middle, low = parts
    dot = together(product(k, high), product(k, middle), product(k, low))
    x = tl.where(seen[:, None], dot * unit + shift, LOWEST)
    higher = most(peak, tl.max(x, 0))
    shrink = tl.exp2(peak - higher)
    w = tl.where(seen[:, None], tl.exp2(x - higher[None]), 0.0)
    weighted = product(tl.trans(v), in_two_halves(w, C))
    k, v = k.to(tl.float32), v.to(tl.float32)
    return (
        tl.fma(acc, tl.broadcast_to(shrink[None], acc.shape), weighted),  # not by `+`, see `device_math.add`
        total * shrink + tl.sum(w, 0), most(longest_key, tl.max(tl.sum(k * k, 1), 0)),
        most(longest_value, tl.max(tl.sum(v * v, 1), 0)), higher,
    )  # fmt: skip


@triton.jit
def store_found(found, acc, sums, C: tl.constexpr, D: tl.constexpr):
    """At `acc` [D, C] and `sums` [4, C]."""
    values, total, longest_key, longest_value, peak = found
    column = tl.arange(0, C)
    tl.store(acc + tl.arange(0, D)[:, None] * C + column[None], values)
    tl.store(sums + column, total)
    tl.store(sums + C + column, longest_key)
    tl.store(sums + 2 * C + column, longest_value)
    tl.store(sums + 3 * C + column, peak)
