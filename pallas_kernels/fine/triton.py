"""Chosen tiles in Triton with both planes of keys and values, and pieces of originals, from the host.

Twin: `fine/reference.py`.
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
    TILE,
    add_values,
    attend_tile_of_originals,
    exact_queries,
    integer_dot,
    load_values,
    next_chosen,
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

COUNTS, N_FINEST, N_PROMOTED = tl.constexpr(lv.COUNTS), tl.constexpr(lv.N_FINEST), tl.constexpr(lv.N_PROMOTED)
FINEST, PROMOTED = tl.constexpr(lv.FINEST), tl.constexpr(lv.PROMOTED)
UNIT, SHIFT = tl.constexpr(qr.UNIT), tl.constexpr(qr.SHIFT)
LOW_UNIT, HALF_FINE = tl.constexpr(qr.LOW_UNIT), tl.constexpr(qr.HALF_FINE)
AT_ONCE = tl.constexpr(128)
"""Tiles whose numbers are looked at together."""


@triton.jit
def _visit_half(
    keys, keys_low, key_scale, value_scale, nu, first, pieces, queries, numbers, C: tl.constexpr, D: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Of HALF tokens from `first` on, but for `pieces`: what they add to sums, and weights times the values' scale."""
    token = first + tl.arange(0, HALF)
    whole, lower, upper = queries
    unit, low_unit, half, shift = numbers
    k = tl.load(keys + token[:, None] * D + tl.arange(0, D)[None])
    k_low = tl.load(keys_low + token[:, None] * (D // 2) + tl.arange(0, D // 2)[None])
    notes = notes_of(key_scale, value_scale, nu, token)
    # 16 times a field is a byte: the lower field moved up, and the upper one as it is.
    low = integer_dot((k_low << 4).to(tl.int8), lower) + integer_dot((k_low & -16).to(tl.int8), upper)
    x = integer_dot(k, whole) * unit + low * low_unit + half
    w = tl.exp2(x * notes[0][:, None] + shift)
    w = tl.where(((pieces >> (token // SIZE)) & 1 == 1)[:, None], 0.0, w)  # read from the host
    return weigh(w, notes, C)


@triton.jit
def _refine(
    h, number, refining, head,
    words, parts, numbers, keys, keys_low, key_scale, values, values_low, value_scale, nu,  # inputs
    acc, stats,  # outputs
    NT: tl.constexpr, FLAGS: tl.constexpr, C: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr,
    EVERY_PIECE: tl.constexpr,
):  # fmt: skip
    """What program `number` of so many that refine does for a head: tiles of its share that are read at their finest.
    """
    of = parts + h * PARTS * C * D
    queries = query_parts(of, C, D, 0, D), query_parts(of, C, D, 0, D // 2), query_parts(of, C, D, D // 2, D // 2)
    of_scores = (
        numbers_of(numbers, h, UNIT, C), numbers_of(numbers, h, LOW_UNIT, C), numbers_of(numbers, h, HALF_FINE, C),
        numbers_of(numbers, h, SHIFT, C),
    )  # fmt: skip
    total, place = no_values(C, D), tl.arange(0, AT_ONCE)
    for start in tl.range(number, NT, refining * AT_ONCE):
        tile = start + place * refining
        word = tl.load(words + h * FLAGS + tile, mask=tile < NT, other=0)
        level, at = word & 255, -1
        chosen = (level == FINEST) | ((level == PROMOTED) & ((word >> 8) != EVERY_PIECE))
        for _ in tl.range(0, tl.sum(chosen.to(tl.int32), 0), num_stages=1):
            at = next_chosen(chosen, at, AT_ONCE)
            here = start + at * refining
            pieces, row = tl.load(words + h * FLAGS + here) >> 8, head * NT + here
            first = row * TILE
            k, low, ks = keys + first * D, keys_low + first * (D // 2), key_scale + first
            vs, share = value_scale + first, nu + first
            a, w = _visit_half(k, low, ks, vs, share, 0, pieces, queries, of_scores, C, D, SIZE)
            b, other_w = _visit_half(k, low, ks, vs, share, HALF, pieces, queries, of_scores, C, D, SIZE)
            store_sums(stats + (h * NT + here) * 4 * C, a + b, C)
            upper = load_values(values + row * D * HALF, 1, 4, D)
            lower = load_values(values_low + row * D * (HALF // 2), 1, 2, D)
            total = add_values(total, upper, (w, other_w), 4, 4, D)
            total = add_values(total, lower, (w, other_w), 2, 1, D)
    store_channels(acc, total, C, D)


@triton.jit
def _read_pieces(
    h, number, reading, head,
    words, wide, numbers, host_keys, host_values,  # inputs
    acc, sums,  # outputs
    NT: tl.constexpr, FLAGS: tl.constexpr, C: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """What program `number` of so many that read from the host does for a head: promoted pieces of the tiles of its
    share."""
    q, unit, shift = exact_queries(wide, numbers, h, C, D)
    found, place = nothing(C, D), tl.arange(0, AT_ONCE)
    for start in tl.range(number, NT, reading * AT_ONCE):
        tile = start + place * reading
        word = tl.load(words + h * FLAGS + tile, mask=tile < NT, other=0)
        chosen, at = (word & 255) == PROMOTED, -1
        for _ in tl.range(0, tl.sum(chosen.to(tl.int32), 0), num_stages=1):
            at = next_chosen(chosen, at, AT_ONCE)
            here = start + at * reading
            pieces = tl.load(words + h * FLAGS + here) >> 8
            for first in tl.range(0, TILE, HALF, num_stages=1):  # the whole at once would take all registers
                token = first + tl.arange(0, HALF)
                seen = (pieces >> (token // SIZE)) & 1 == 1
                of = (head * NT + here) * TILE * D + token[:, None] * D + tl.arange(0, D)[None]
                k = tl.load(host_keys + of, mask=seen[:, None], other=0.0)
                v = tl.load(host_values + of, mask=seen[:, None], other=0.0)
                found = attend_tile_of_originals(k, v, seen, q, unit, shift, found, C)
    store_found(found, acc, sums, C, D)


@triton.jit
def _attend_fine(
    layer, words, counts, parts, wide, numbers, keys, keys_low, key_scale, values, values_low, value_scale, nu,
    host_keys, host_values,  # inputs
    acc, stats, host_acc, host_sums,  # outputs
    H: tl.constexpr, NT: tl.constexpr, FLAGS: tl.constexpr, C: tl.constexpr, D: tl.constexpr, READERS: tl.constexpr,
    SPLITS: tl.constexpr, SIZE: tl.constexpr, EVERY_PIECE: tl.constexpr,
):  # fmt: skip
    program, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n_promoted = tl.load(counts + h * COUNTS + N_PROMOTED)
    n_tiles = n_promoted + tl.load(counts + h * COUNTS + N_FINEST)
    head = tl.load(layer).to(tl.int64) * H + h
    # As in `levels.at_work`.
    reading, refining = tl.minimum(n_promoted, READERS), tl.minimum(n_tiles, SPLITS)
    if READERS > 0:  # noqa: SIM102, which the compiler knows
        if program < reading:
            row = h * READERS + program
            _read_pieces(
                h, program, reading, head, words, wide, numbers, host_keys, host_values, host_acc + row * D * C,
                host_sums + row * 4 * C, NT, FLAGS, C, D, SIZE,
            )  # fmt: skip
    number = program - READERS
    if (number >= 0) & (number < refining):
        _refine(
            h, number, refining, head, words, parts, numbers, keys, keys_low, key_scale, values, values_low,
            value_scale, nu, acc + (h * SPLITS + number) * D * C, stats, NT, FLAGS, C, D, SIZE, EVERY_PIECE,
        )  # fmt: skip


def attend_fine(
    layer, words, counts, summary, q: qr.Operands, keys, keys_low, key_scale, values, values_low, value_scale, nu,
    host_keys, host_values, *, splits: int, readers: int,
):  # fmt: skip
    """Programs 0 to `readers` of a head read from the host. `summary` is not asked for."""
    heads, n, d = keys.shape[1:]
    columns, n_tiles = q.parts.shape[2], n // lv.TILE
    host = keys, keys  # never read
    if host_keys is not None:
        host = host_keys, host_values
    readers = 0 if host_keys is None else readers
    shapes = [(heads, splits, d, columns), (heads, n_tiles, 4, columns)]
    shapes += [(heads, max(readers, 1), rows, columns) for rows in (d, 4)]
    found = launch(
        _attend_fine, layer, words, counts, q.parts, q.wide, q.numbers, keys, keys_low, key_scale, values, values_low,
        value_scale, nu, *host, out=[jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes],
        grid=(readers + splits, heads), H=heads, NT=n_tiles, FLAGS=words.shape[1], C=columns, D=d, READERS=readers,
        SPLITS=splits, SIZE=lv.tokens_of_a_piece(d), EVERY_PIECE=lv.every_piece(d),
    )  # fmt: skip
    return found if readers else found[:2]
