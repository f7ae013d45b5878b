"""What tiles add to the bound, added up. Twin: the sums of `certjax.fused.bound.judge`. Symbols and derivation:
docs/kernels.md."""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels import levels as lv
from pallas_kernels.device_math import exp_down, exp_up, least
from pallas_kernels.tile_facts import (
    SLACK,
    key_terms,
    linear_value_terms,
    load_sums,
    number,
    tile_sums,
)

COARSE, VALUES, FINEST, PROMOTED = (tl.constexpr(x) for x in (lv.COARSE, lv.VALUES, lv.FINEST, lv.PROMOTED))

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
def _either(kept, which, one, other):
    return tl.where(kept, tl.where(which, one, other), 0.0)


@triton.jit
def tally_tiles(
    h, part, n_parts,  # which share of a head's tiles
    words, stats, fine_stats, kappa, eta, nu, sigma_k, sigma_v, rho_k, rho_v, facts, meta, layer,  # inputs
    sums, kappa_max,  # outputs
    H: tl.constexpr, NT: tl.constexpr, FLAGS: tl.constexpr, C: tl.constexpr, T: tl.constexpr,
    ALL_PIECES: tl.constexpr,
):  # fmt: skip
    """What the tiles add to the bound."""
    at, col = tl.load(layer), tl.arange(0, C)
    t = part * T + tl.arange(0, T)
    there, noted, row = t < NT, (at * H + h) * NT + t, h * NT + t
    # Everything is loaded at once, at both of two levels: what waits for a plan's word waits twice.
    first, end = tl.load(meta + h * 3), tl.load(meta + h * 3 + 1)
    word, q_norm = tl.load(words + h * FLAGS + t, mask=there, other=0), tl.load(facts + h * 4 * C + col)
    by_scan, by_fine = load_sums(stats, row, there, C), load_sums(fine_stats, row, there, C)
    nu_peak = number(nu + noted, there)
    kappa_0, kappa_1 = number(kappa + noted * 2, there), number(kappa + noted * 2 + 1, there)
    eta_0, eta_1 = number(eta + noted * 2, there), number(eta + noted * 2 + 1, there)
    sigma_k0, sigma_k1 = number(sigma_k + noted * 2, there), number(sigma_k + noted * 2 + 1, there)
    rho_k0, rho_k1 = number(rho_k + noted * 2, there), number(rho_k + noted * 2 + 1, there)
    rho_v0, rho_v1 = number(rho_v + noted * 2, there), number(rho_v + noted * 2 + 1, there)
    sigma_v0, sigma_v1 = number(sigma_v + noted * 3, there), number(sigma_v + noted * 3 + 1, there)
    sigma_v2 = number(sigma_v + noted * 3 + 2, there)

    active = (t >= first) & (t < end)
    word = tl.where(active, word, 0)
    level = word & 255
    promoted = level == PROMOTED
    whole = word == ALL_PIECES
    finest = (level >= FINEST) & ~whole  # or what is not promoted of it
    values = finest | (level == VALUES)  # whose values are read at their finest
    delta = least(q_norm[None] * (tl.where(active, kappa_0, 0.0) * SLACK)[:, None], 80.0)
    weight = tl.where(promoted[:, None], by_scan[0], 0.0)
    above, below = weight * exp_up(delta), weight * exp_down(-delta)
    a, n, norm, scaled, keyed, keyed_n = tile_sums(by_scan, nu_peak, active & ~finest)
    b, m, fine_norm, fine_scaled, fine_keyed, fine_keyed_n = tile_sums(by_fine, nu_peak, active & finest)
    kept = active & ~whole
    nu_peak = tl.where(active, nu_peak, 0.0)
    here = kept[:, None]
    a, n = tl.where(here, a + b, 0.0), tl.where(here, n + m, 0.0)  # one of the two is 0
    norm = tl.where(finest[:, None], fine_norm, norm)
    kappa_t = _either(kept, finest, kappa_1, kappa_0)
    k0, k1, grown, delta = key_terms(
        a, n, norm, keyed + fine_keyed, keyed_n + fine_keyed_n, q_norm, kappa_t,
        _either(kept, finest, sigma_k1, sigma_k0), _either(kept, finest, rho_k1, rho_k0), nu_peak,
    )  # fmt: skip
    eta_t = _either(kept, values, eta_1, eta_0)[:, None]
    read_here = (values | (level == COARSE))[:, None] & here
    by_level = tl.where(finest[:, None], fine_scaled, scaled)
    linear = linear_value_terms(a, by_level, eta_t, _either(kept, values, rho_v1, rho_v0)[:, None])
    linear = tl.where(read_here, linear, n)
    spectral = _either(kept, values, sigma_v2, tl.where(level == COARSE, sigma_v1, sigma_v0))[:, None] * norm
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
def added_up(sums, h, PARTS: tl.constexpr, PARTS_UP: tl.constexpr, C: tl.constexpr):
    """The sums of all shares of a head, [C] each."""
    part = tl.arange(0, PARTS_UP)
    of = sums + (h * PARTS + part[:, None]) * (C * ADDED) + tl.arange(0, C * ADDED)[None]
    added = tl.sum(tl.load(of, mask=(part < PARTS)[:, None], other=0.0), 0)
    even, odd = tl.split(tl.reshape(added, (C, 2, 2, 2, 2)))
    even_0, even_1 = tl.split(even)
    odd_0, odd_1 = tl.split(odd)
    a, n_read, k0, above = _apart(even_0)
    value, paper, grown_n, high = _apart(even_1)
    n, eta_read, k1, below = _apart(odd_0)
    shrunk, less, grown_a, low = _apart(odd_1)
    return a, n, n_read, eta_read, k0, k1, grown_n, grown_a, value, paper, shrunk, less, above, below, high, low


FEWEST_TILES, MOST_TILES, ENOUGH_PARTS = 32, 128, 10
"""That a program adds up; and programs of a head, more of which would not all run at once."""


def tiles_and_parts(n_tiles: int) -> tuple[int, int]:
    """Tiles that a program adds up, and how many such sums are added up after it."""
    tiles = min(MOST_TILES, max(FEWEST_TILES, triton.next_power_of_2(-(-n_tiles // ENOUGH_PARTS))))
    return tiles, -(-n_tiles // tiles)
