"""Output and certificate of a head, from what `tally` and `join` added up. Twin: `certjax.fused.bound.judge`. Symbols
and derivation: docs/kernels.md."""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels import levels as lv
from pallas_kernels import numerics as num
from pallas_kernels.device_math import MAX_DELTA, add, exp_up, expm1_up, least, most, no_nan, product, rounded
from pallas_kernels.judge.join import FROM_ALL, FROM_WINDOWS, KEY, VALUE
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
    length,
)
from pallas_kernels.judge.tally import added_up
from pallas_kernels.tile_facts import SLACK

TILE, TILES_READ = tl.constexpr(lv.TILE), tl.constexpr(lv.TILES_READ)
PARTS_OF_A_WINDOW = tl.constexpr(lv.PARTS_OF_A_WINDOW)
U, UNDERFLOW, FLOOR = tl.constexpr(num.U), tl.constexpr(num.UNDERFLOW), tl.constexpr(num.ABSOLUTE_FLOOR)


@triton.jit
def _turned_back(y, signs):
    """`R^T y`, [D, C]: in three parts of 8 bits, whose products with the signs of R^T are exact."""
    high = rounded(y)
    middle = rounded(y - high)
    low = rounded(y - high - middle)
    return add(product(signs, high), add(product(signs, middle), product(signs, low)))


@triton.jit
def judge_head(
    h, sums, kappa_max, joined, exact_sums, summary, facts, largest_of_head, value_centre, turn, layer,  # inputs
    out, record,  # outputs
    passed_before,
    H: tl.constexpr, NT: tl.constexpr, PARTS: tl.constexpr, PARTS_UP: tl.constexpr, C: tl.constexpr,
    D: tl.constexpr, ROOT: tl.constexpr, VANISHED: tl.constexpr, SPLIT: tl.constexpr, TURNING: tl.constexpr,
    DEPTH_GAMMA: tl.constexpr, INFLATE: tl.constexpr, EXP_RELATIVE_ERROR: tl.constexpr, CANARY: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCKS_UP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    at = tl.load(layer)
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
    of_windows, exact_total = tl.load(of + FROM_WINDOWS * C), tl.load(of + FROM_ALL * C)
    key, value = length(tl.load(of + KEY * C), ROOT, VANISHED), length(tl.load(of + VALUE * C), ROOT, VANISHED)
    part = tl.arange(0, PARTS_UP)
    largest_kappa = tl.max(tl.load(kappa_max + h * PARTS + part, mask=part < PARTS, other=0.0), 0)
    tier1, n_all, n_read, eta_read, k0, k1, g0, g1, val, paper, shrunk, offset, high, low, rest_high, rest_low = (
        added_up(sums, h, PARTS, PARTS_UP, C)
    )

    total = tier1 + exact_total  # W
    reads = pieces.to(tl.float32) + PARTS_OF_A_WINDOW  # a program reads no more than all
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
