"""First pass of a step in Triton: every key at its coarsest level, the values that a plan asks for at theirs, the
windows in full.

Twin: `scan/reference.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import levels as lv
from pallas_kernels import query as qr
from pallas_kernels.device_tiles import (
    HALF,
    PARTS,
    QUARTER,
    TILE,
    add_values,
    attend_tile_of_originals,
    exact_queries,
    integer_dot,
    load_values,
    no_values,
    notes_of,
    nothing,
    numbers_of,
    query_parts,
    store_channels,
    store_found,
    store_sums,
    weigh,
)
from pallas_kernels.launch import launch

COARSE, VALUES = tl.constexpr(lv.COARSE), tl.constexpr(lv.VALUES)
UNIT, HALF_UNIT, SHIFT = tl.constexpr(qr.UNIT), tl.constexpr(qr.HALF), tl.constexpr(qr.SHIFT)


@triton.jit
def _visit_half(
    keys, key_scale, value_scale, nu, first, parts, unit, half, shift, stored, C: tl.constexpr, D: tl.constexpr
):
    """Of HALF tokens from `first` on: what they add to sums, and weights times the values' scale, which are stored."""
    token = first + tl.arange(0, HALF)
    k = tl.load(keys + token[:, None] * D + tl.arange(0, D)[None])
    notes = notes_of(key_scale, value_scale, nu, token)
    w = tl.exp2((integer_dot(k, parts) * unit + half) * notes[0][:, None] + shift)
    sums, halves = weigh(w, notes, C)
    tl.store(stored + tl.arange(0, C)[None] * TILE + token[:, None], halves.to(tl.bfloat16))
    return sums, halves


@triton.jit
def _attend_window(
    h, index, head, live, wide, numbers, sink_keys, sink_values, ring_keys, ring_values, acc, sums, C: tl.constexpr,
    D: tl.constexpr, SINK: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """All of one tile of the windows."""
    if index < SINK:
        at = (head * SINK + index) * TILE * D
        k, v = sink_keys + at, sink_values + at
    else:
        at = (head * RING + index - SINK) * TILE * D
        k, v = ring_keys + at, ring_values + at
    q, unit, shift = exact_queries(wide, numbers, h, C, D)
    row, found = h * (SINK + RING) + index, nothing(C, D)
    n = tl.load(live + row)
    for start in tl.range(0, TILE, QUARTER, num_stages=1):  # the whole at once would take all registers
        token = start + tl.arange(0, QUARTER)
        of, read = token[:, None] * D + tl.arange(0, D)[None], (tl.zeros_like(token) < n)[:, None]
        tile, values = tl.load(k + of, mask=read, other=0.0), tl.load(v + of, mask=read, other=0.0)
        found = attend_tile_of_originals(tile, values, token < n, q, unit, shift, found, C)
    store_found(found, acc + row * D * C, sums + row * 4 * C, C, D)


@triton.jit
def _scan_tiles(
    layer, meta, words, parts, wide, numbers, keys, key_scale, values, values_low, value_scale, nu, live, sink_keys,
    sink_values, ring_keys, ring_values,  # inputs
    stats, weights, coarse, acc, sums,  # outputs
    H: tl.constexpr, NT: tl.constexpr, FLAGS: tl.constexpr, C: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
    SINK: tl.constexpr, RING: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    h, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = tl.load(layer).to(tl.int64) * H + h
    if split < SPLITS:
        first, end = tl.load(meta + 3 * h), tl.load(meta + 3 * h + 1)
        q = query_parts(parts + h * PARTS * C * D, C, D, 0, D)
        unit, half = numbers_of(numbers, h, UNIT, C), numbers_of(numbers, h, HALF_UNIT, C)
        shift = numbers_of(numbers, h, SHIFT, C)
        found = no_values(C, D)
        for tile in tl.range(first + split, end, SPLITS, num_stages=2):
            level, row = tl.load(words + h * FLAGS + tile) & 255, head * NT + tile
            of, to = row * TILE, weights + (h * NT + tile) * C * TILE
            reads_low = level == VALUES
            reads = (level == COARSE) | reads_low
            if AHEAD:
                upper = load_values(values + row * D * HALF, reads.to(tl.int32), 4, D)
                lower = load_values(values_low + row * D * (HALF // 2), reads_low.to(tl.int32), 2, D)
            k, ks, vs, share = keys + of * D, key_scale + of, value_scale + of, nu + of
            a, w = _visit_half(k, ks, vs, share, 0, q, unit, half, shift, to, C, D)
            b, other_w = _visit_half(k, ks, vs, share, HALF, q, unit, half, shift, to, C, D)
            store_sums(stats + (h * NT + tile) * 4 * C, a + b, C)
            if reads:
                if not AHEAD:
                    upper = load_values(values + row * D * HALF, 1, 4, D)
                found = add_values(found, upper, (w, other_w), 4, 4, D)
            if reads_low:
                if not AHEAD:
                    lower = load_values(values_low + row * D * (HALF // 2), 1, 2, D)
                found = add_values(found, lower, (w, other_w), 2, 1, D)
        store_channels(coarse + (h * SPLITS + split) * D * C, found, C, D)
    else:
        _attend_window(
            h, split - SPLITS, head, live, wide, numbers, sink_keys, sink_values, ring_keys, ring_values, acc, sums, C,
            D, SINK, RING,
        )  # fmt: skip


def scan_tiles(
    layer, meta, words, q: qr.Operands, keys, key_scale, values, values_low, value_scale, nu, live, windows, *,
    splits: int, ahead: bool = True,
):  # fmt: skip
    """`ahead`: values, too, are on their way into shared memory before a tile's turn, which takes 61 KB of it in place
    of 37."""
    heads, n, d = keys.shape[1:]
    n_tiles, columns, f32 = n // lv.TILE, q.parts.shape[2], jnp.float32
    ring, sink = windows[-2:], windows[:2]
    n_ring, n_windows = ring[0].shape[2] // lv.TILE, live.shape[1]
    shapes = [
        ((heads, n_tiles, 4, columns), f32), ((heads, n_tiles, columns, lv.TILE), jnp.bfloat16),
        *(((heads, *rows, columns), f32) for rows in ((splits, d), (n_windows, d), (n_windows, 4))),
    ]  # fmt: skip
    return launch(
        _scan_tiles, layer, meta, words, q.parts, q.wide, q.numbers, keys, key_scale, values, values_low, value_scale,
        nu, live, *sink, *ring, out=[jax.ShapeDtypeStruct(*x) for x in shapes], grid=(heads, splits + n_windows),
        H=heads, NT=n_tiles, FLAGS=words.shape[1], C=columns, D=d, SPLITS=splits, SINK=n_windows - n_ring, RING=n_ring,
        AHEAD=ahead,
    )  # fmt: skip
