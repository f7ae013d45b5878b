"""Output and certificate of a pass. Twin: `certjax.fused.bound.judge`. Symbols and derivation: docs/kernels.md."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from pallas_kernels import levels as lv
from pallas_kernels import numerics as num
from pallas_kernels.device_math import MAX_DELTA, exp_down, exp_up, expm1_up, least, most, no_nan, product, rounded
from pallas_kernels.judge.record import ROWS, Rounding, length
from pallas_kernels.launch import launch
from pallas_kernels.tile_facts import (
    NOTES,
    SLACK,
    add_originals,
    folded,
    key_terms,
    keyed_sums,
    linear_value_terms,
    number,
    tile_sums,
)

TILE, COUNTS = tl.constexpr(lv.TILE), tl.constexpr(lv.COUNTS)
U, UNDERFLOW, FLOOR = tl.constexpr(num.U), tl.constexpr(num.UNDERFLOW), tl.constexpr(num.ABSOLUTE_FLOOR)


@triton.jit
def _turned_back(y, signs):
    """`R^T y`, [D, C]: in three parts of 8 bits, whose products with the signs of R^T are exact."""
    high = rounded(y)
    middle = rounded(y - high)
    low = rounded(y - high - middle)
    return product(signs, high) + (product(signs, middle) + product(signs, low))


SUMS, ADDED = tl.constexpr(17), tl.constexpr(16)
"""Of a part of a head, from `_tally`: sums over tiles, 16 of them, and the largest kappa."""


@triton.jit
def _four(a, b, c, d):
    return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def _part_of(acc, h, split, here, flat, S: tl.constexpr, SIZE: tl.constexpr):
    return tl.sum(tl.load(acc + (h * S + split) * SIZE + flat, mask=here & (split < S), other=0.0), 0)


@triton.jit
def _tally(
    words, counts, stats, fine_stats, acc, fine_acc, kappa, eta, nu, sigma_k, sigma_v, rho_k, rho_v, facts, meta,
    layer,  # inputs
    sums, read,  # outputs
    H: tl.constexpr, NT: tl.constexpr, FLAGS: tl.constexpr, S: tl.constexpr, PER_PART: tl.constexpr,
    FINE_S: tl.constexpr, FINE_PER_PART: tl.constexpr, PER_PART_UP: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    T: tl.constexpr, ALL_PIECES: tl.constexpr,
):  # fmt: skip
    """What a share of a head's tiles adds to the bound, and a share of what programs of the second pass found."""
    h, part, at = tl.program_id(0), tl.program_id(1), tl.load(layer)
    n_parts, col = tl.num_programs(1), tl.arange(0, C)
    i, flat = tl.arange(0, PER_PART_UP)[:, None], tl.arange(0, D * C)
    found = _part_of(acc, h, part * PER_PART + i, i < PER_PART, flat[None], S, D * C)
    if tl.load(counts + h * COUNTS + 2) + tl.load(counts + h * COUNTS + 3) > 0:  # else nothing was stored
        found += _part_of(fine_acc, h, part * FINE_PER_PART + i, i < FINE_PER_PART, flat[None], FINE_S, D * C)
    tl.store(read + (h * n_parts + part) * (D * C) + flat, found)

    t = part * T + tl.arange(0, T)
    active = (t >= tl.load(meta + h * 3)) & (t < tl.load(meta + h * 3 + 1))
    noted, row = (at * H + h) * NT + t, h * NT + t
    word = tl.load(words + h * FLAGS + t, mask=active, other=0)
    level = word & 255
    coarse, promoted = level == 1, level == 3
    whole = word == ALL_PIECES
    finest = (level >= 2) & ~whole  # or what is not promoted of it
    q_norm = tl.load(facts + h * 4 * C + col)
    nu_peak = number(nu + noted, active)
    delta = least(q_norm[None] * (number(kappa + noted * 2, active) * SLACK)[:, None], 80.0)
    of = stats + row[:, None] * (4 * C) + (col % (C // 2))[None]
    weight = tl.load(of, mask=promoted[:, None], other=0.0)
    above, below = weight * exp_up(delta), weight * exp_down(-delta)
    a, n, norm, scaled = tile_sums(stats, row, nu_peak, active & ~finest, C)
    b, m, fine_norm, fine_scaled = tile_sums(fine_stats, row, nu_peak, active & finest, C)
    kept = active & ~whole
    here = kept[:, None]
    a, n = tl.where(here, a + b, 0.0), tl.where(here, n + m, 0.0)  # one of the two is 0
    norm = tl.where(finest[:, None], fine_norm, norm)
    plane = finest.to(tl.int32)
    kappa_t = number(kappa + noted * 2 + plane, kept)
    keyed, keyed_n = keyed_sums(stats, row, nu_peak, active & ~finest, C)
    fine_keyed, fine_keyed_n = keyed_sums(fine_stats, row, nu_peak, active & finest, C)
    k0, k1, grown, delta = key_terms(
        a, n, norm, keyed + fine_keyed, keyed_n + fine_keyed_n, q_norm, kappa_t,
        number(sigma_k + noted * 2 + plane, kept), number(rho_k + noted * 2 + plane, kept), nu_peak,
    )  # fmt: skip
    eta_t = number(eta + noted * 2 + plane, kept)[:, None]
    read_here = (coarse | finest)[:, None] & here
    by_level = tl.where(finest[:, None], fine_scaled, scaled)
    linear = linear_value_terms(a, by_level, eta_t, number(rho_v + noted * 2 + plane, kept)[:, None])
    linear = tl.where(read_here, linear, n)
    spectral = number(sigma_v + noted * 3 + tl.where(finest, 2, tl.where(coarse, 1, 0)), kept)[:, None] * norm
    # A value is `s (4 high + 2)`, or `s (4 high + low + 2.5)`.
    less = tl.where(finest[:, None], 2.5 * fine_scaled, tl.where(coarse[:, None], 2 * scaled, 0.0))
    shrunk, rest = a * exp_down(-least(delta, 80.0)), (promoted & finest)[:, None]
    value = tl.where(here, least(linear, spectral), 0.0)
    k0, k1, less = tl.where(here, k0, 0.0), tl.where(here, k1, 0.0), tl.where(here, less, 0.0)
    n_read, eta_read = tl.where(read_here, n, 0.0), tl.where(read_here, a * eta_t, 0.0)
    paper = tl.where(read_here, a * eta_t, a * nu_peak[:, None])
    high = tl.where(rest, a * exp_up(least(delta, 80.0)), 0.0)
    low = tl.where(rest, shrunk, 0.0)
    # All sums at once: for each by itself every warp would wait for the others. The outermost `join` says whether a
    # field is even or odd, the innermost whether it is below 8.
    even = tl.join(_four(a, n_read, k0, above), _four(value, paper, grown * n, high))
    odd = tl.join(_four(n, eta_read, k1, below), _four(shrunk, less, grown * a, low))
    total = tl.sum(tl.reshape(tl.join(even, odd), (T, C, ADDED)), 0)  # [C, ADDED]
    to = sums + (h * n_parts + part) * SUMS * C
    tl.store(to + tl.arange(0, ADDED)[None] * C + col[:, None], total)
    tl.store(to + ADDED * C + col, tl.full((C,), 1.0, tl.float32) * tl.max(kappa_t, 0))


@triton.jit
def _sum(sums, h, field, PARTS: tl.constexpr, C: tl.constexpr):
    """Over parts; part by part, so that no thread waits for another."""
    of = sums + (h * PARTS * SUMS + field) * C + tl.arange(0, C)
    total = tl.load(of)
    for part in tl.range(1, PARTS, loop_unroll_factor=8):
        total += tl.load(of + part * SUMS * C)
    return total


@triton.jit
def _judge(
    sums, read, window_acc, window_sums, host_acc, host_sums, counts, facts, largest_of_head, value_centre, turn,
    layer,  # inputs
    out, record,  # outputs
    H: tl.constexpr, NT: tl.constexpr, PARTS: tl.constexpr, P: tl.constexpr, P_UP: tl.constexpr,
    W: tl.constexpr, C: tl.constexpr, D: tl.constexpr, ROOT: tl.constexpr,
    VANISHED: tl.constexpr, HIGHEST: tl.constexpr, SPLIT: tl.constexpr, TURNING: tl.constexpr,
    DEPTH_GAMMA: tl.constexpr, INFLATE: tl.constexpr, READS: tl.constexpr, EXP_RELATIVE_ERROR: tl.constexpr,
    CANARY: tl.constexpr,
):  # fmt: skip
    h, at = tl.program_id(0), tl.load(layer)
    col, channel = tl.arange(0, C), tl.arange(0, D)
    of = facts + h * 4 * C + col
    q_norm, eps, eps_original, reference = tl.load(of), tl.load(of + C), tl.load(of + 2 * C), tl.load(of + 3 * C)
    n_promoted = tl.load(counts + h * COUNTS + 3)
    tier1, n_all = _sum(sums, h, 0, PARTS, C), _sum(sums, h, 1, PARTS, C)
    val, shrunk = _sum(sums, h, 2, PARTS, C), _sum(sums, h, 3, PARTS, C)
    k0, k1 = _sum(sums, h, 4, PARTS, C), _sum(sums, h, 5, PARTS, C)
    g0, g1 = _sum(sums, h, 6, PARTS, C), _sum(sums, h, 7, PARTS, C)
    n_read, eta_read = _sum(sums, h, 8, PARTS, C), _sum(sums, h, 9, PARTS, C)
    paper, offset = _sum(sums, h, 10, PARTS, C), _sum(sums, h, 11, PARTS, C)
    high, low = _sum(sums, h, 12, PARTS, C), _sum(sums, h, 13, PARTS, C)
    rest_high, rest_low = _sum(sums, h, 14, PARTS, C), _sum(sums, h, 15, PARTS, C)
    kappa_max = tl.load(sums + (h * PARTS * SUMS + ADDED) * C + col)
    flat = tl.arange(0, D * C)
    found = tl.load(read + h * PARTS * (D * C) + flat)
    for part in tl.range(1, PARTS, loop_unroll_factor=8):
        kappa_max = most(kappa_max, tl.load(sums + ((h * PARTS + part) * SUMS + ADDED) * C + col))
        found += tl.load(read + (h * PARTS + part) * (D * C) + flat)
    centre = tl.load(value_centre + (at * H + h) * D + channel)[:, None]
    of_head = largest_of_head + at * 6 * H + h
    nu_max, eta_max, centre_norm = tl.load(of_head + H), tl.load(of_head + 2 * H), tl.load(of_head + 5 * H)
    signs = tl.load(turn + channel[:, None] * D + channel[None]).to(tl.float32)
    found = folded(found, D, C)

    # Windows, and what came from the host.
    exact, exact_total, key, value = add_originals(window_acc, window_sums, h * W, W, 1, D, C, HIGHEST)
    of_windows = exact_total
    if n_promoted > 0:
        more, more_total, more_key, more_value = add_originals(host_acc, host_sums, h * P, P, P_UP, D, C, HIGHEST)
        exact, exact_total = exact + more, exact_total + more_total
        key, value = most(key, more_key), most(value, more_value)
    key, value = length(key, ROOT, VANISHED), length(value, ROOT, VANISHED)

    total = tier1 + exact_total  # W
    reads = tl.minimum(n_promoted, READS).to(tl.float32) + 1  # a program reads a piece of each tile of its share
    joined = _turned_back(found + offset[None], signs) * (1 / ROOT) + tier1[None] * centre + exact
    result = joined / total[None]
    from_centre = length(tl.sum((centre - result) * (centre - result), 0), ROOT, VANISHED)
    norm = length(tl.sum(result * result, 0), ROOT, VANISHED)
    share = exact_total / total
    exact_nu = value + centre_norm
    nu_mean = n_all / total + share * exact_nu
    read_mean = (n_read + eta_read) / total
    e_val = val / total
    accumulated = ((1 + 0.3 * ROOT) * SPLIT + 2 * TURNING) * read_mean + SPLIT * share * value
    accumulated += (3 * DEPTH_GAMMA + 8 * U) * (nu_mean + centre_norm + read_mean) + 2 * U * reads * share * value
    from_centre += 2 * accumulated
    h_bar = from_centre + e_val
    l_minus = shrunk / total + share
    delta_max = q_norm * (kappa_max * SLACK)
    e_key = (k0 + k1 * h_bar) / (total * l_minus)
    linear = (g0 + g1 * h_bar) / (total * l_minus)
    of_originals = 32 * U * (q_norm * key + tl.abs(reference)) + EXP_RELATIVE_ERROR + reads * 2.0**-21
    of_originals += eps_original * key * SLACK
    eps = most(eps, of_originals)
    grow = exp_up(least(eps, MAX_DELTA))
    widened = expm1_up(2 * eps) * linear + grow * expm1_up(eps) * (nu_mean + h_bar) / l_minus
    nu_max = most(nu_max, exact_nu)
    n_tokens = (NT + 64) * TILE
    # 32: of a product of a weight and a key's scale 2^-126 may vanish, and counts LARGEST_STEP times that.
    flushed = 32 * n_tokens * UNDERFLOW / total * exp_up(least(delta_max, MAX_DELTA)) * grow * grow / l_minus
    flushed *= nu_max + eta_max + h_bar
    # Weights times a value's scale, and their lower halves, may vanish too: 2^-125 each, times a code or rho.
    flushed += n_tokens * (2.0**-117 * ROOT) / total
    valid = (2 * eps < MAX_DELTA) & (delta_max < MAX_DELTA)
    e_key = tl.where(delta_max < MAX_DELTA, e_key, float("inf"))
    e_arith = tl.where(valid, widened + flushed + accumulated, float("inf"))
    bound = least(no_nan(e_key + e_val + e_arith), no_nan(nu_max + from_centre))
    two_d = least(2 * delta_max, 80.0)
    mass = tier1 / total

    passed = tl.full((C,), 1.0, tl.float32)
    if CANARY:
        # Promoted tiles weigh by their originals, and by tier 1 at its finest where they are not read, what they weigh
        # by tier 1 at its coarsest, within its bound.
        slack = exp_up(tl.load(facts + h * 4 * C + C + col) + eps + 2.0**-12)
        from_host = exact_total - of_windows
        rounding = 2.0**-18 * exact_total + 2.0**-100  # of the difference; of what was flushed
        # What is not a number is not an alarm: it fails as such.
        alarm = (from_host + rest_low > high * slack + rounding) | (from_host + rest_high < low / slack - rounding)
        passed = tl.where(alarm, 0.0, 1.0)
    tl.store(out + (h * C + col[None]) * D + channel[:, None], result)
    to = record + h * ROWS * C + col
    tl.store(to, norm)
    tl.store(to + C, e_key)
    tl.store(to + 2 * C, e_val)
    tl.store(to + 3 * C, e_arith)
    tl.store(to + 4 * C, bound * INFLATE + FLOOR)
    grows = tl.where(two_d < 0.5, expm1_up(two_d), exp_up(two_d))
    tl.store(to + 5 * C, 2 * nu_max * exp_up(two_d) * mass * grows)
    tl.store(to + 6 * C, paper / total)
    tl.store(to + 7 * C, delta_max)
    tl.store(to + 8 * C, mass)
    tl.store(to + 9 * C, passed)


def tiles_and_parts(n_tiles: int) -> tuple[int, int]:
    """Tiles that a program of `_tally` adds up, and how many such sums are added up after it."""
    tiles = max(32, min(128, triton.next_power_of_2(n_tiles) // 4))
    return tiles, -(-n_tiles // tiles)


def judge(
    words: jax.Array,  # [H, flags] int32, `pallas_kernels.levels`
    scanned: jax.Array,  # [H, NT, 4, C] of the scan
    coarse: jax.Array,  # [H, S, d, C] of the second pass
    fine: tuple[jax.Array, jax.Array],  # [H, S', d, C], [H, NT, 4, C] of the second pass
    windows: tuple[jax.Array, jax.Array],  # [H, W, d, C], [H, W, 4, C]
    promoted: tuple[jax.Array, jax.Array],  # [H, P, d, C], [H, P, 4, C]
    counts: jax.Array,  # [H, COUNTS] int32
    notes: dict[str, jax.Array],
    facts: jax.Array,  # [H, 4, C]
    largest: jax.Array,  # [L, 6, H]
    value_centre: jax.Array,  # [L, H, d]
    turn: np.ndarray,  # [d, d], R^T
    meta: jax.Array,
    layer: jax.Array,
    rounding: Rounding,
    *,
    canary: bool,
) -> tuple[jax.Array, jax.Array]:
    """Outputs `[H, C, d]`, and the rows NORM to PASSED of each head, `[H, ROWS, C]`, float32."""
    heads, splits, d, columns = coarse.shape
    fine_splits, n_tiles, f32 = fine[0].shape[1], scanned.shape[1], jnp.float32
    tiles, parts = tiles_and_parts(n_tiles)
    per_part, fine_per_part = -(-splits // parts), -(-fine_splits // parts)
    shape = dict(H=heads, NT=n_tiles, C=columns, D=d)
    sums, read = launch(
        _tally, words, counts, scanned, fine[1], coarse, fine[0],
        *(notes[x] for x in NOTES), facts, meta, layer,
        out=[
            jax.ShapeDtypeStruct((heads, parts, SUMS.value, columns), f32),
            jax.ShapeDtypeStruct((heads, parts, d, columns), f32),
        ],
        grid=(heads, parts), FLAGS=words.shape[1], S=splits, PER_PART=per_part, FINE_S=fine_splits,
        FINE_PER_PART=fine_per_part, PER_PART_UP=triton.next_power_of_2(max(per_part, fine_per_part)), T=tiles, warps=8,
        ALL_PIECES=lv.word(lv.PROMOTED, lv.every_piece(d)), **shape,
    )  # fmt: skip
    from_windows, from_host = windows[0].shape[1], promoted[0].shape[1]
    return launch(
        _judge, sums, read, *windows, *promoted, counts, facts, largest, value_centre,
        jnp.asarray(np.sign(turn), jnp.int8), layer,
        out=[
            jax.ShapeDtypeStruct((heads, columns, d), f32),
            jax.ShapeDtypeStruct((heads, ROWS.value, columns), f32),
        ],
        grid=(heads,), warps=8, PARTS=parts, P=from_host, P_UP=triton.next_power_of_2(from_host), W=from_windows,
        ROOT=d**0.5, VANISHED=rounding.vanished, HIGHEST=rounding.highest, SPLIT=rounding.split,
        TURNING=rounding.turning, DEPTH_GAMMA=rounding.depth_gamma, INFLATE=rounding.inflate,
        READS=rounding.reads, EXP_RELATIVE_ERROR=num.EXP_RELATIVE_ERROR, CANARY=canary,
        **shape,
    )  # fmt: skip
