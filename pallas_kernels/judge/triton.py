"""Output and certificate of a pass: `_tally` adds up what tiles add to the bound, `_judge` puts it together with what
`join` added up. Twin: `certjax.fused.bound.judge`. Symbols and derivation: docs/kernels.md."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from pallas_kernels import levels as lv
from pallas_kernels import numerics as num
from pallas_kernels.device_math import MAX_DELTA, exp_down, exp_up, expm1_up, least, most, no_nan, product, rounded
from pallas_kernels.judge import record as rc
from pallas_kernels.judge.join import join
from pallas_kernels.judge.record import (
    DELTA_MAX,
    E_ARITH,
    E_KEY,
    E_KEY_PAPER,
    E_TOTAL,
    E_VAL,
    E_VAL_PAPER,
    FROM_CENTRE,
    L_MINUS,
    NORM,
    NU_MEAN,
    PASSED,
    RETURNED_BOUND,
    RETURNED_NORM,
    ROWS,
    TAIL_MASS,
    TOTAL,
    Rounding,
    length,
)
from pallas_kernels.launch import launch
from pallas_kernels.tile_facts import (
    NOTES,
    SLACK,
    key_terms,
    keyed_sums,
    linear_value_terms,
    number,
    tile_sums,
)

COARSE, VALUES, FINEST, PROMOTED = (tl.constexpr(x) for x in (lv.COARSE, lv.VALUES, lv.FINEST, lv.PROMOTED))
TILE, TILES_READ, REDO = tl.constexpr(lv.TILE), tl.constexpr(lv.TILES_READ), tl.constexpr(rc.REDO)
U, UNDERFLOW, FLOOR = tl.constexpr(num.U), tl.constexpr(num.UNDERFLOW), tl.constexpr(num.ABSOLUTE_FLOOR)


@triton.jit
def _turned_back(y, signs):
    """`R^T y`, [D, C]: in three parts of 8 bits, whose products with the signs of R^T are exact."""
    high = rounded(y)
    middle = rounded(y - high)
    low = rounded(y - high - middle)
    return product(signs, high) + (product(signs, middle) + product(signs, low))


ADDED = tl.constexpr(16)
"""Sums over tiles, of a part of a head."""


@triton.jit
def _four(a, b, c, d):
    return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def _apart(x):
    """`_four`, undone: [C, 2, 2]."""
    ab, cd = tl.split(x)
    a, b = tl.split(ab)
    c, d = tl.split(cd)
    return a, b, c, d


@triton.jit
def _tally_tiles(
    words, stats, fine_stats, kappa, eta, nu, sigma_k, sigma_v, rho_k, rho_v, facts, meta, layer,  # inputs
    sums, kappa_max,  # outputs
    H: tl.constexpr, NT: tl.constexpr, FLAGS: tl.constexpr, C: tl.constexpr, T: tl.constexpr,
    ALL_PIECES: tl.constexpr,
):  # fmt: skip
    """What a share of a head's tiles adds to the bound."""
    h, part, at = tl.program_id(0), tl.program_id(1), tl.load(layer)
    n_parts, col = tl.num_programs(1), tl.arange(0, C)
    t = part * T + tl.arange(0, T)
    active = (t >= tl.load(meta + h * 3)) & (t < tl.load(meta + h * 3 + 1))
    noted, row = (at * H + h) * NT + t, h * NT + t
    word = tl.load(words + h * FLAGS + t, mask=active, other=0)
    level = word & 255
    promoted = level == PROMOTED
    whole = word == ALL_PIECES
    finest = (level >= FINEST) & ~whole  # or what is not promoted of it
    values = finest | (level == VALUES)  # whose values are read at their finest
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
    plane, values_plane = finest.to(tl.int32), values.to(tl.int32)
    kappa_t = number(kappa + noted * 2 + plane, kept)
    keyed, keyed_n = keyed_sums(stats, row, nu_peak, active & ~finest, C)
    fine_keyed, fine_keyed_n = keyed_sums(fine_stats, row, nu_peak, active & finest, C)
    k0, k1, grown, delta = key_terms(
        a, n, norm, keyed + fine_keyed, keyed_n + fine_keyed_n, q_norm, kappa_t,
        number(sigma_k + noted * 2 + plane, kept), number(rho_k + noted * 2 + plane, kept), nu_peak,
    )  # fmt: skip
    eta_t = number(eta + noted * 2 + values_plane, kept)[:, None]
    read_here = (values | (level == COARSE))[:, None] & here
    by_level = tl.where(finest[:, None], fine_scaled, scaled)
    linear = linear_value_terms(a, by_level, eta_t, number(rho_v + noted * 2 + values_plane, kept)[:, None])
    linear = tl.where(read_here, linear, n)
    spectral = number(sigma_v + noted * 3 + tl.where(values, 2, (level == COARSE).to(tl.int32)), kept)[:, None] * norm
    # A value is `s (4 high + 2)`, or `s (4 high + low + 2.5)`.
    less = tl.where(values[:, None], 2.5 * by_level, tl.where((level == COARSE)[:, None], 2 * scaled, 0.0))
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
    to = sums + (h * n_parts + part) * (C * ADDED)
    tl.store(to + col[:, None] * ADDED + tl.arange(0, ADDED)[None], total)
    tl.store(kappa_max + h * n_parts + part, tl.max(kappa_t, 0))


@triton.jit
def _tally(
    words, stats, fine_stats, kappa, eta, nu, sigma_k, sigma_v, rho_k, rho_v, facts, meta, layer, asked,  # inputs
    sums, kappa_max,  # outputs
    H: tl.constexpr, NT: tl.constexpr, FLAGS: tl.constexpr, C: tl.constexpr, T: tl.constexpr,
    ALL_PIECES: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    what = REDO if FIRST else tl.load(asked + tl.program_id(0))
    if what == REDO:
        _tally_tiles(
            words, stats, fine_stats, kappa, eta, nu, sigma_k, sigma_v, rho_k, rho_v, facts, meta, layer, sums,
            kappa_max, H, NT, FLAGS, C, T, ALL_PIECES,
        )  # fmt: skip


@triton.jit
def _judge_head(
    sums, kappa_max, joined, exact_sums, summary, facts, largest_of_head, value_centre, turn, layer,  # inputs
    out, record,  # outputs
    passed_before,
    H: tl.constexpr, NT: tl.constexpr, PARTS: tl.constexpr, PARTS_UP: tl.constexpr, C: tl.constexpr,
    D: tl.constexpr, ROOT: tl.constexpr, VANISHED: tl.constexpr, SPLIT: tl.constexpr, TURNING: tl.constexpr,
    DEPTH_GAMMA: tl.constexpr, INFLATE: tl.constexpr, EXP_RELATIVE_ERROR: tl.constexpr, CANARY: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCKS_UP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    h, at = tl.program_id(0), tl.load(layer)
    col, channel = tl.arange(0, C), tl.arange(0, D)
    of = facts + h * 4 * C + col
    q_norm, eps, eps_original, reference = tl.load(of), tl.load(of + C), tl.load(of + 2 * C), tl.load(of + 3 * C)
    block = tl.arange(0, BLOCKS_UP)
    pieces = tl.sum(tl.load(summary + h * BLOCKS + block, mask=block < BLOCKS, other=0) % TILES_READ, 0)
    centre = tl.load(value_centre + (at * H + h) * D + channel)[:, None]
    of_head = largest_of_head + at * 6 * H + h
    nu_max, eta_max, centre_norm = tl.load(of_head + H), tl.load(of_head + 2 * H), tl.load(of_head + 5 * H)
    signs = tl.load(turn + channel[:, None] * D + channel[None]).to(tl.float32)
    of = joined + h * 2 * D * C + channel[:, None] * C + col[None]
    found, exact = tl.load(of), tl.load(of + D * C)
    of = exact_sums + h * 4 * C + col
    of_windows, exact_total = tl.load(of), tl.load(of + C)
    key, value = length(tl.load(of + 2 * C), ROOT, VANISHED), length(tl.load(of + 3 * C), ROOT, VANISHED)
    part = tl.arange(0, PARTS_UP)
    largest_kappa = tl.max(tl.load(kappa_max + h * PARTS + part, mask=part < PARTS, other=0.0), 0)
    of = sums + (h * PARTS + part[:, None]) * (C * ADDED) + tl.arange(0, C * ADDED)[None]
    added = tl.sum(tl.load(of, mask=(part < PARTS)[:, None], other=0.0), 0)
    # As `_tally_tiles` has joined them.
    even, odd = tl.split(tl.reshape(added, (C, 2, 2, 2, 2)))
    even_0, even_1 = tl.split(even)
    odd_0, odd_1 = tl.split(odd)
    tier1, n_read, k0, high = _apart(even_0)
    val, paper, g0, rest_high = _apart(even_1)
    n_all, eta_read, k1, low = _apart(odd_0)
    shrunk, offset, g1, rest_low = _apart(odd_1)

    total = tier1 + exact_total  # W
    reads = pieces.to(tl.float32) + 1  # a program reads no more than all
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
    delta_max = q_norm * (largest_kappa * SLACK)
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

    passed = passed_before
    if CANARY:
        # Promoted tiles weigh by their originals, and by tier 1 at its finest where they are not read, what they weigh
        # by tier 1 at its coarsest, within its bound.
        slack = exp_up(tl.load(facts + h * 4 * C + C + col) + eps + 2.0**-12)
        from_host = exact_total - of_windows
        rounding = 2.0**-18 * exact_total + 2.0**-100  # of the difference; of what was flushed
        # What is not a number is not an alarm: it fails as such.
        alarm = (from_host + rest_low > high * slack + rounding) | (from_host + rest_high < low / slack - rounding)
        passed = tl.where(alarm, 0.0, passed)
    tl.store(out + (h * GROUP + col[None]) * D + channel[:, None], result, mask=(col < GROUP)[None])
    to = record + h * ROWS * C + col
    tl.store(to + NORM * C, norm)
    tl.store(to + E_KEY * C, e_key)
    tl.store(to + E_VAL * C, e_val)
    tl.store(to + E_ARITH * C, e_arith)
    bound = bound * INFLATE + FLOOR
    tl.store(to + E_TOTAL * C, bound)
    grows = tl.where(two_d < 0.5, expm1_up(two_d), exp_up(two_d))
    tl.store(to + E_KEY_PAPER * C, 2 * nu_max * exp_up(two_d) * mass * grows)
    tl.store(to + E_VAL_PAPER * C, paper / total)
    tl.store(to + DELTA_MAX * C, delta_max)
    tl.store(to + TAIL_MASS * C, mass)
    tl.store(to + PASSED * C, passed)
    tl.store(to + TOTAL * C, total)
    tl.store(to + L_MINUS * C, l_minus)
    tl.store(to + FROM_CENTRE * C, from_centre)
    tl.store(to + NU_MEAN * C, nu_mean)
    tl.store(to + RETURNED_NORM * C, norm)
    tl.store(to + RETURNED_BOUND * C, bound)


@triton.jit
def _judge(
    sums, kappa_max, joined, exact_sums, summary, facts, largest_of_head, value_centre, turn, layer,  # inputs
    out, record,  # outputs
    H: tl.constexpr, NT: tl.constexpr, PARTS: tl.constexpr, PARTS_UP: tl.constexpr, C: tl.constexpr,
    D: tl.constexpr, ROOT: tl.constexpr, VANISHED: tl.constexpr, SPLIT: tl.constexpr, TURNING: tl.constexpr,
    DEPTH_GAMMA: tl.constexpr, INFLATE: tl.constexpr, EXP_RELATIVE_ERROR: tl.constexpr, CANARY: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCKS_UP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    _judge_head(
        sums, kappa_max, joined, exact_sums, summary, facts, largest_of_head, value_centre, turn, layer, out, record,
        tl.full((C,), 1.0, tl.float32), H, NT, PARTS, PARTS_UP, C, D, ROOT, VANISHED, SPLIT, TURNING, DEPTH_GAMMA,
        INFLATE, EXP_RELATIVE_ERROR, CANARY, BLOCKS, BLOCKS_UP, GROUP,
    )  # fmt: skip


@triton.jit
def _judge_again(
    sums, kappa_max, joined, exact_sums, summary, facts, largest_of_head, value_centre, turn, layer, asked,
    out_before, record_before,  # inputs
    out, record,  # outputs
    H: tl.constexpr, NT: tl.constexpr, PARTS: tl.constexpr, PARTS_UP: tl.constexpr, C: tl.constexpr,
    D: tl.constexpr, ROOT: tl.constexpr, VANISHED: tl.constexpr, SPLIT: tl.constexpr, TURNING: tl.constexpr,
    DEPTH_GAMMA: tl.constexpr, INFLATE: tl.constexpr, EXP_RELATIVE_ERROR: tl.constexpr, CANARY: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCKS_UP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """What the second pass found, in place of what the first did, for heads of which it was asked."""
    h = tl.program_id(0)
    if tl.load(asked + h) == REDO:
        passed = tl.load(record + (h * ROWS + PASSED) * C + tl.arange(0, C))
        _judge_head(
            sums, kappa_max, joined, exact_sums, summary, facts, largest_of_head, value_centre, turn, layer, out,
            record, passed, H, NT, PARTS, PARTS_UP, C, D, ROOT, VANISHED, SPLIT, TURNING, DEPTH_GAMMA, INFLATE,
            EXP_RELATIVE_ERROR, CANARY, BLOCKS, BLOCKS_UP, GROUP,
        )  # fmt: skip


TILES = 32
"""That a program of `_tally` adds up."""


def tiles_and_parts(n_tiles: int) -> tuple[int, int]:
    """Tiles that a program of `_tally` adds up, and how many such sums are added up after it."""
    return TILES, -(-n_tiles // TILES)


@dataclasses.dataclass(frozen=True)
class Found:
    """What was read of a layer by a plan, and the plan."""

    words: jax.Array  # [H, flags] int32, `pallas_kernels.levels`
    counts: jax.Array  # [H, COUNTS] int32
    summary: jax.Array  # [H, .] int32
    scanned: jax.Array  # [H, NT, 4, C] of the scan
    coarse: jax.Array  # [H, S, d, C], values with the scan's weights
    fine: tuple[jax.Array, jax.Array]  # [H, S', d, C], [H, NT, 4, C]
    windows: tuple[jax.Array, jax.Array]  # [H, W, d, C], [H, W, 4, C]
    promoted: tuple[jax.Array, jax.Array]  # [H, P, d, C], [H, P, 4, C]


@dataclasses.dataclass(frozen=True)
class Layer:
    """What else the judgement of a layer rests on."""

    notes: dict[str, jax.Array]
    facts: jax.Array  # [H, 4, C]
    largest: jax.Array  # [L, 6, H]
    value_centre: jax.Array  # [L, H, d]
    turn: np.ndarray  # [d, d], R^T
    meta: jax.Array
    index: jax.Array  # [1] int32


def judge(
    found: Found, layer: Layer, rounding: Rounding, *, group: int, canary: bool
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Outputs `[H, group, d]`, and the rows of `record`, `[H, ROWS, C]`, float32."""
    shapes, arrays, constants = _of_heads(found, layer, None, rounding, group, canary)
    return launch(_judge, *arrays, out=shapes, grid=(found.counts.shape[0],), warps=8, **constants)


def judge_again(
    found: Found, layer: Layer, asked: jax.Array, out: jax.Array, record: jax.Array, rounding: Rounding, *,
    canary: bool,
) -> list[jax.Array]:  # fmt: skip
    """`out` and `record` of `judge`, where a second pass was `asked` for what that found."""
    shapes, arrays, constants = _of_heads(found, layer, asked, rounding, out.shape[1], canary)
    n = len(arrays)
    return launch(
        _judge_again, *arrays, asked, out, record, out=shapes, in_place={n + 1: 0, n + 2: 1},
        grid=(out.shape[0],), warps=8, **constants,
    )  # fmt: skip


def _of_heads(found: Found, layer: Layer, asked: jax.Array | None, rounding: Rounding, group: int, canary: bool):
    """Shapes of outputs, and what `_judge_head` takes: arrays, constants."""
    heads, n_tiles, _, columns = found.scanned.shape
    d, f32, blocks = found.coarse.shape[2], jnp.float32, found.summary.shape[1]
    tiles, parts = tiles_and_parts(n_tiles)
    shape = dict(H=heads, NT=n_tiles, C=columns)
    tallied = launch(
        _tally, found.words, found.scanned, found.fine[1], *(layer.notes[x] for x in NOTES), layer.facts, layer.meta,
        layer.index, found.counts if asked is None else asked,
        out=[
            jax.ShapeDtypeStruct((heads, parts, columns, ADDED.value), f32),
            jax.ShapeDtypeStruct((heads, parts), f32),
        ],
        grid=(heads, parts), FLAGS=found.words.shape[1], T=tiles, ALL_PIECES=lv.word(lv.PROMOTED, lv.every_piece(d)),
        FIRST=asked is None, **shape,
    )  # fmt: skip
    joined = join(
        found.coarse, found.fine[0], found.windows, found.promoted, found.counts, asked, rounding.highest
    )
    shapes = [
        jax.ShapeDtypeStruct((heads, group, d), f32),
        jax.ShapeDtypeStruct((heads, ROWS.value, columns), f32),
    ]
    arrays = (
        *tallied, *joined, found.summary, layer.facts, layer.largest, layer.value_centre,
        jnp.asarray(np.sign(layer.turn), jnp.int8), layer.index,
    )  # fmt: skip
    constants = dict(
        PARTS=parts, PARTS_UP=triton.next_power_of_2(parts), D=d, ROOT=d**0.5, VANISHED=rounding.vanished,
        SPLIT=rounding.split, TURNING=rounding.turning, DEPTH_GAMMA=rounding.depth_gamma, INFLATE=rounding.inflate,
        EXP_RELATIVE_ERROR=num.EXP_RELATIVE_ERROR, CANARY=canary, BLOCKS=blocks,
        BLOCKS_UP=triton.next_power_of_2(blocks), GROUP=group, **shape,
    )  # fmt: skip
    return shapes, arrays, constants
