"""Which tiles to read, and at which level. Twin: `certjax.fused.plan.choose`.

Two kernels, as the second needs sums over what the first found: `_offer` says what is asked for at all, what each tile
would add to the bound and what is left of a layer's at every price, `_settle` takes the highest price that fits. These
are estimates: they decide what is read and nothing else.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import levels as lv
from pallas_kernels.device_math import expm1_up, least, most, no_nan, product, rounded
from pallas_kernels.judge import record as rc
from pallas_kernels.judge.record import ROWS
from pallas_kernels.launch import launch
from pallas_kernels.tile_facts import (
    NOTES,
    key_terms,
    keyed_sums,
    linear_value_terms,
    number,
    tile_sums,
)

PRICES, STEPS, ROWS_OF_PRICES = tl.constexpr(62), tl.constexpr(4), tl.constexpr(64)
"""Candidates for the price of reading a tile at its finest, in shares of a layer's tolerance: so many, so many to a
factor of two. Behind what is left at each of them come what the bound came to by the plan before, and what is estimated
of it."""

COUNTS = tl.constexpr(lv.COUNTS)
COARSE, PROMOTED, WHOLE = tl.constexpr(lv.COARSE), tl.constexpr(lv.PROMOTED), tl.constexpr(lv.PROMOTED + 1)
"""Levels while they are chosen: some pieces of a tile, all of them."""

KEPT, ANEW, REDO = tl.constexpr(rc.KEPT), tl.constexpr(rc.ANEW), tl.constexpr(rc.REDO)

CHUNK, LOOK, TILES_READ = lv.CHUNK, tl.constexpr(lv.LOOK), tl.constexpr(lv.TILES_READ)
AT_ONCE = tl.constexpr(8)
"""Promoted tiles whose pieces are chosen at once."""

LARGEST = tl.constexpr(1e30)


@triton.jit
def _fits(norm, own, shown, TOLERANCE: tl.constexpr, RELATIVE_TO: tl.constexpr, POOLED: tl.constexpr,
          SHARES: tl.constexpr):  # fmt: skip
    """Whether a row keeps its tolerance as it is, `[heads, C]`: what `_decide` says of nobody going dense."""
    own = tl.where(shown, no_nan(own), 0.0)
    if RELATIVE_TO == "layer":
        # In units of the longest output, so that no square overflows or vanishes.
        unit = 1 / least(most(tl.max(tl.max(norm, 1), 0), 2.0**-100), 2.0**100)
        own, norm = own * unit, norm * unit
        squares = tl.sum(tl.sum(norm * norm, 1), 0)
        bounds = tl.sum(tl.sum(own * own, 1), 0)
        if not POOLED:
            worst = tl.max(tl.max(own, 1), 0)
            bounds = worst * worst * SHARES
        fits = (bounds <= (TOLERANCE * TOLERANCE * (1 - 2.0**-14)) * squares) & (squares < float("inf"))
    else:
        if RELATIVE_TO == "head":
            allowed = tl.where(tl.abs(norm) < float("inf"), TOLERANCE * norm, 0.0)
        else:
            allowed = tl.full(norm.shape, TOLERANCE, tl.float32)
        fits = tl.sum(tl.sum((~(own <= allowed) & shown).to(tl.int32), 1), 0) == 0
    return fits


@triton.jit
def _offer(
    stats, kappa, eta, nu, sigma_k, sigma_v, rho_k, rho_v, facts, record, before, meta, layer,  # inputs
    asked, costs, shares, left,  # outputs
    H: tl.constexpr, HEADS: tl.constexpr, HEADS_UP: tl.constexpr, CHUNKS: tl.constexpr, NT: tl.constexpr,
    GROUP: tl.constexpr, C: tl.constexpr, T: tl.constexpr, RELATIVE_TO: tl.constexpr, TOLERANCE: tl.constexpr,
    AIM: tl.constexpr, POOLED: tl.constexpr, COARSE_FEE: tl.constexpr, HOST_FEE: tl.constexpr, PIECES: tl.constexpr,
    SUMMED: tl.constexpr, REFRESH: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    h, chunk, at = tl.program_id(0), tl.program_id(1), tl.load(layer)
    row, col = tl.arange(0, HEADS_UP)[:, None], tl.arange(0, C)
    shown = (row < HEADS) & (col < GROUP)[None]
    of = record + (h // HEADS * HEADS + row) * ROWS * C + col[None]
    norm, bound = tl.load(of, mask=shown, other=0.0), tl.load(of + 4 * C, mask=shown, other=0.0)
    length = tl.load(meta + h * 3 + 2)
    fits = _fits(norm, bound, shown, TOLERANCE, RELATIVE_TO, POOLED, HEADS * GROUP)
    what = tl.where(fits, tl.where((length + at) % REFRESH == 0, ANEW, KEPT), REDO)
    if chunk == 0:
        tl.store(asked + h, what)
    if what != KEPT:
        _offer_tiles(
            stats, kappa, eta, nu, sigma_k, sigma_v, rho_k, rho_v, facts, record, before, norm, meta, at, costs, shares,
            left, H, HEADS, CHUNKS, NT, GROUP, C, T, RELATIVE_TO, AIM * TOLERANCE, POOLED, COARSE_FEE, HOST_FEE, PIECES,
            SUMMED, FLAGS,
        )  # fmt: skip


@triton.jit
def _offer_tiles(
    stats, kappa, eta, nu, sigma_k, sigma_v, rho_k, rho_v, facts, record, before, norms, meta, at,  # inputs
    costs, shares, left,  # outputs
    H: tl.constexpr, HEADS: tl.constexpr, CHUNKS: tl.constexpr, NT: tl.constexpr, GROUP: tl.constexpr,
    C: tl.constexpr, T: tl.constexpr, RELATIVE_TO: tl.constexpr, TOLERANCE: tl.constexpr, POOLED: tl.constexpr,
    COARSE_FEE: tl.constexpr, HOST_FEE: tl.constexpr, PIECES: tl.constexpr, SUMMED: tl.constexpr,
    FLAGS: tl.constexpr,
):  # fmt: skip
    h, chunk = tl.program_id(0), tl.program_id(1)
    col, t = tl.arange(0, C), chunk * T + tl.arange(0, T)
    # Everything is loaded first: a load that comes after a sum over several warps waits for it.
    q_norm, eps = tl.load(facts + h * 4 * C + col), tl.load(facts + h * 4 * C + C + col)
    of = record + h * ROWS * C + col
    own, total, l_minus = tl.load(of), tl.load(of + 10 * C), tl.load(of + 11 * C)
    from_centre, nu_mean, came_to = tl.load(of + 12 * C), tl.load(of + 13 * C), tl.load(of + 4 * C)
    first, end = tl.load(meta + h * 3), tl.load(meta + h * 3 + 1)
    active = (t >= first) & (t < end)
    noted = (at * H + h) * NT + t
    now = tl.load(before + h * FLAGS + t, mask=active, other=0)
    now = tl.where(now == (3 | ((2**PIECES - 1) << 8)), WHOLE, now & 255)
    nu_peak = number(nu + noted, active)
    kappa_0, kappa_1 = number(kappa + noted * 2, active), number(kappa + noted * 2 + 1, active)
    sigma_k0, sigma_k1 = number(sigma_k + noted * 2, active), number(sigma_k + noted * 2 + 1, active)
    rho_k0, rho_k1 = number(rho_k + noted * 2, active), number(rho_k + noted * 2 + 1, active)
    eta_0, eta_1 = number(eta + noted * 2, active)[:, None], number(eta + noted * 2 + 1, active)[:, None]
    rho_v0, rho_v1 = number(rho_v + noted * 2, active)[:, None], number(rho_v + noted * 2 + 1, active)[:, None]
    sigma_v0, sigma_v1 = number(sigma_v + noted * 3, active)[:, None], number(sigma_v + noted * 3 + 1, active)[:, None]
    sigma_v2 = number(sigma_v + noted * 3 + 2, active)[:, None]
    a, n, norm, scaled = tile_sums(stats, h * NT + t, nu_peak, active, C)
    keyed, keyed_n = keyed_sums(stats, h * NT + t, nu_peak, active, C)

    if RELATIVE_TO == "absolute":
        room = tl.full((C,), TOLERANCE, tl.float32)
    else:
        if RELATIVE_TO == "layer":
            square = tl.full((C,), 1.0, tl.float32) * (tl.sum(tl.sum(norms * norms, 1), 0) / (HEADS * GROUP))
            room = tl.where(square < float("inf"), TOLERANCE * tl.sqrt(square), 0.0)
        else:
            room = tl.where(own < float("inf"), TOLERANCE * own, 0.0)
    h_bar = from_centre + 2 * room  # what the values may add to it
    kept = (col < GROUP)[None]

    k0, k1, _, _ = key_terms(a, n, norm, keyed, keyed_n, q_norm, kappa_0, sigma_k0, rho_k0, nu_peak)
    coarse_keys = (k0 + k1 * h_bar[None]) / l_minus[None]
    k0, k1, _, _ = key_terms(a, n, norm, keyed, keyed_n, q_norm, kappa_1, sigma_k1, rho_k1, nu_peak)
    fine_keys = (k0 + k1 * h_bar[None]) / l_minus[None]
    skipped = least(n, sigma_v0 * norm)
    coarse = least(linear_value_terms(a, scaled, eta_0, rho_v0), sigma_v1 * norm)
    fine = least(linear_value_terms(a, scaled, eta_1, rho_v1), sigma_v2 * norm)
    of_total, of_room = (1 / total)[None], (1 / room)[None]
    shown = kept & active[:, None]
    o0 = tl.where(shown, least(no_nan((coarse_keys + skipped) * of_total * of_room), LARGEST), 0.0)
    o1 = tl.where(shown, least(no_nan((coarse_keys + coarse) * of_total * of_room), LARGEST), 0.0)
    o2 = tl.where(shown, least(no_nan((fine_keys + fine) * of_total * of_room), LARGEST), 0.0)
    heaviest = norm / most(a, 2.0**-120)
    o3 = o2 * (1 - heaviest * heaviest)  # what may be left once the heaviest token's piece is read from the host
    if POOLED:
        c0 = tl.sqrt(tl.sum(o0 * o0, 1) * (1 / GROUP))
        c1 = tl.sqrt(tl.sum(o1 * o1, 1) * (1 / GROUP))
        c2 = tl.sqrt(tl.sum(o2 * o2, 1) * (1 / GROUP))
        c3 = tl.sqrt(tl.sum(o3 * o3, 1) * (1 / GROUP))
    else:
        c0, c1, c2, c3 = tl.max(o0, 1), tl.max(o1, 1), tl.max(o2, 1), tl.max(o3, 1)
    to = costs + h * 4 * NT + t
    tl.store(to, c0, mask=t < NT)
    tl.store(to + NT, c1, mask=t < NT)
    tl.store(to + 2 * NT, c2, mask=t < NT)
    tl.store(to + 3 * NT, c3, mask=t < NT)
    to = shares + (h * NT + t[:, None]) * (C // 2) + col[None]
    tl.store(to, o2, mask=(t < NT)[:, None] & (col < C // 2)[None])

    j = tl.arange(0, ROWS_OF_PRICES)
    price = tl.exp2(-j.to(tl.float32) / STEPS)[:, None]
    level = _levels(c0[None], c1[None], c2[None], c3[None], price, COARSE_FEE, HOST_FEE, PIECES)  # [J, T]
    level = tl.where((j < PRICES)[:, None], level, now[None])
    # Sums over tiles by the matrix unit; estimates may be off by the 2^-9 of its operands.
    remains = product((level == 0).to(tl.float32), rounded(o0)) + product((level == 1).to(tl.float32), rounded(o1))
    remains += product((level == 2).to(tl.float32), rounded(o2)) + product((level == 3).to(tl.float32), rounded(o3))
    if chunk == 0:
        rounding = 1.25 * expm1_up(eps) * (nu_mean + h_bar) + SUMMED * nu_mean
        remains += tl.where(col < GROUP, no_nan(rounding / room), 0.0)[None]
    came_to = tl.where((col < GROUP) & (chunk == 0), came_to / room, 0.0)
    remains = tl.where((j == PRICES)[:, None], came_to[None], remains)
    to = left + ((h * CHUNKS + chunk) * ROWS_OF_PRICES + j[:, None]) * (C // 2) + col[None]
    tl.store(to, remains, mask=(col < C // 2)[None])


@triton.jit
def _levels(skip, coarse, fine, some, price, COARSE_FEE: tl.constexpr, HOST_FEE: tl.constexpr,
            PIECES: tl.constexpr):  # fmt: skip
    """0 skip, 1 coarse, 2 finest, 3 promote a piece, 4 or all: whichever is the least, its fee included."""
    coarse = coarse + COARSE_FEE * price
    fine = fine + price
    lowest = tl.minimum(tl.minimum(skip, coarse), fine)
    level = tl.where(skip <= lowest, 0, tl.where(coarse <= lowest, 1, 2))
    some = some + price * (1 + HOST_FEE / PIECES)
    level = tl.where(some < lowest, PROMOTED, level)
    return tl.where(price * HOST_FEE < tl.minimum(lowest, some), WHOLE, level)


@triton.jit
def _level_at(costs, h, t, active, price, NT: tl.constexpr, COARSE_FEE: tl.constexpr, HOST_FEE: tl.constexpr,
              PIECES: tl.constexpr):  # fmt: skip
    of = costs + h * 4 * NT + t
    return _levels(
        tl.load(of, mask=active, other=0.0), tl.load(of + NT, mask=active, other=0.0),
        tl.load(of + 2 * NT, mask=active, other=0.0), tl.load(of + 3 * NT, mask=active, other=0.0), price, COARSE_FEE,
        HOST_FEE, PIECES,
    )  # fmt: skip


@triton.jit
def _settle(
    costs, left, shares, weights, meta, asked, before,  # inputs
    words, counts, summary, held,  # outputs
    HEADS: tl.constexpr, HEADS_UP: tl.constexpr, NT: tl.constexpr, FLAGS: tl.constexpr, N_CHUNKS: tl.constexpr,
    GROUP: tl.constexpr, C: tl.constexpr, T: tl.constexpr, POOLED: tl.constexpr, COARSE_FEE: tl.constexpr,
    HOST_FEE: tl.constexpr, PIECES: tl.constexpr, MAX_PROMOTED: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """A new plan where one is asked for, and what the cache keeps for the next step."""
    h, own = tl.program_id(0), tl.program_id(1)
    what = tl.load(asked + h)
    if what != KEPT:
        _settle_tiles(
            costs, left, shares, weights, meta, what, words, counts, summary, held, HEADS, HEADS_UP, NT, FLAGS,
            N_CHUNKS, GROUP, C, T, POOLED, COARSE_FEE, HOST_FEE, PIECES, MAX_PROMOTED, LEAST,
        )  # fmt: skip
    else:
        t = own * T + tl.arange(0, T)
        active = (t >= tl.load(meta + h * 3)) & (t < tl.load(meta + h * 3 + 1))
        tl.store(held + h * FLAGS + t, tl.load(before + h * FLAGS + t, mask=active, other=COARSE), mask=t < FLAGS)
        block = tl.arange(0, T // LOOK)
        tl.store(summary + (h * tl.num_programs(1) + own) * (T // LOOK) + block, tl.zeros((T // LOOK,), tl.int32))
        if own == 0:
            column = tl.arange(0, 8)
            tl.store(counts + h * COUNTS + column, tl.zeros((8,), tl.int32), mask=column < COUNTS)


@triton.jit
def _settle_tiles(
    costs, left, shares, weights, meta, what,  # inputs
    words, counts, summary, held,  # outputs
    HEADS: tl.constexpr, HEADS_UP: tl.constexpr, NT: tl.constexpr, FLAGS: tl.constexpr, N_CHUNKS: tl.constexpr,
    GROUP: tl.constexpr, C: tl.constexpr, T: tl.constexpr, POOLED: tl.constexpr, COARSE_FEE: tl.constexpr,
    HOST_FEE: tl.constexpr, PIECES: tl.constexpr, MAX_PROMOTED: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    h, own = tl.program_id(0), tl.program_id(1)
    j, col, tile = tl.arange(0, ROWS_OF_PRICES), tl.arange(0, C // 2), tl.arange(0, T)
    row = tl.arange(0, HEADS_UP)[:, None, None]
    remains = tl.zeros((HEADS_UP, ROWS_OF_PRICES, C // 2), tl.float32)
    for chunk in tl.static_range(N_CHUNKS):
        of = ((h // HEADS * HEADS + row) * N_CHUNKS + chunk) * ROWS_OF_PRICES + j[None, :, None]
        remains += tl.load(left + of * (C // 2) + col[None, None], mask=row < HEADS, other=0.0)
    squares = tl.sum(tl.sum(remains * remains, 2), 0)
    worst = squares * (1 / (HEADS * GROUP)) if POOLED else tl.max(tl.max(remains, 2), 0)
    # What is left falls with the price: the first that fits comes after those that do not.
    of_estimate = tl.sum(tl.where(j == PRICES, worst, 0.0), 0) / tl.sum(tl.where(j == PRICES + 1, worst, 0.0), 0)
    of_estimate = tl.where(of_estimate < float("inf"), tl.minimum(tl.maximum(of_estimate, LEAST), 1.0), 1.0)
    dearer = tl.sum((~(worst * of_estimate <= 1) & (j < PRICES)).to(tl.int32), 0)
    price = tl.exp2(-dearer.to(tl.float32) / STEPS)
    first, end = tl.load(meta + h * 3), tl.load(meta + h * 3 + 1)
    # All programs of a head evaluate the same: what one counts is what the others store.
    n_coarse, n_finest, n_promoted = tl.zeros((T,), tl.int32), tl.zeros((T,), tl.int32), tl.zeros((T,), tl.int32)
    mine = tl.zeros((T,), tl.int32)
    for start in tl.range(0, NT, T, loop_unroll_factor=8):
        t = start + tile
        active = (t >= first) & (t < end)
        level = _level_at(costs, h, t, active, price, NT, COARSE_FEE, HOST_FEE, PIECES)
        level = tl.where(active, level, 0)
        mine = tl.where(start == own * T, level, mine)
        n_coarse += (level == 1).to(tl.int32)
        n_finest += (level == 2).to(tl.int32)
        n_promoted += (level >= PROMOTED).to(tl.int32)
    n_active, n_promoted = tl.maximum(end - first, 0), tl.sum(n_promoted, 0)
    stays = tl.where((n_promoted <= MAX_PROMOTED * n_active.to(tl.float32)) & (dearer < PRICES), 1, 0)
    mine *= stays
    redo = tl.where(what == REDO, 1, 0)
    if own == 0:
        to = counts + h * COUNTS
        tl.store(to, n_active * redo)
        tl.store(to + 1, tl.sum(n_coarse, 0) * stays * redo)
        tl.store(to + 2, tl.sum(n_finest, 0) * stays * redo)
        tl.store(to + 3, n_promoted * stays * redo)
        tl.store(to + 4, (1 - stays) * redo)

    # Which pieces: each would add its share of the tile's weights.
    word = tl.where(mine == WHOLE, 3 | ((2**PIECES - 1) << 8), mine)
    rank = tl.cumsum((mine == PROMOTED).to(tl.int32), 0) - 1
    piece, token, i = tl.arange(0, PIECES), tl.arange(0, T), tl.arange(0, AT_ONCE)
    done, some = 0, tl.sum((mine == PROMOTED).to(tl.int32), 0)
    while done < some:
        found = (rank[None] == done + i[:, None]) & (mine == PROMOTED)[None]  # [AT_ONCE, T]
        valid = tl.sum(found.to(tl.int32), 1) > 0
        at = own * T + tl.sum(tl.where(found, tile[None], 0), 1)
        here = h * NT + at
        source = weights + ((here.to(tl.int64)[:, None] * C + col[None]) * T)[:, :, None] + token[None, None]
        w = tl.load(source, mask=valid[:, None, None], other=0.0).to(tl.float32)
        w += tl.load(source + C // 2 * T, mask=valid[:, None, None], other=0.0).to(tl.float32)
        of_piece = tl.sum(tl.reshape(w, (AT_ONCE, C // 2, PIECES, T // PIECES)), 3)
        share = of_piece / most(tl.sum(of_piece, 2), 2.0**-120)[:, :, None]
        of_tile = tl.load(shares + here[:, None] * (C // 2) + col[None], mask=valid[:, None], other=0.0)
        worth = of_tile[:, :, None] * share
        worth = tl.sqrt(tl.sum(worth * worth, 1) * (1 / GROUP)) if POOLED else tl.max(worth, 1)  # [AT_ONCE, PIECES]
        # The dearest, until the others come to no more than was said to be left.
        one, other = worth[:, :, None], worth[:, None]
        behind = (other < one) | ((other == one) & (piece[None] >= piece[:, None])[None])
        rest = tl.sum(tl.where(behind, other, 0.0), 2)
        left_over = tl.load(costs + (h * 4 + 3) * NT + at, mask=valid, other=0.0)
        dear = (~(rest <= left_over[:, None])).to(tl.int32)
        bits = 3 | (tl.sum(dear << piece[None], 1) << 8)
        chosen = tl.sum(tl.where(found, bits[:, None], 0), 0)
        word = tl.where(chosen > 0, chosen, word)
        done += AT_ONCE
    t = own * T + tile
    tl.store(words + h * FLAGS + t, word, mask=t < FLAGS)
    known = (t >= first) & (t < end) & (stays > 0)
    tl.store(held + h * FLAGS + t, tl.where(known, word, COARSE), mask=t < FLAGS)
    n = tl.sum((((word >> 8)[:, None] >> piece[None]) & 1), 1)
    n += tl.where((mine == 2) | ((mine >= PROMOTED) & (n < PIECES)), TILES_READ, 0)
    block = tl.arange(0, T // LOOK)
    of_block = tl.sum(tl.reshape(n, (T // LOOK, LOOK)), 1) * redo
    tl.store(summary + (h * tl.num_programs(1) + own) * (T // LOOK) + block, of_block)


@dataclasses.dataclass(frozen=True)
class Terms:
    """Of a policy and a shape, what the plan depends on. Fees are in tiles read at their finest."""

    heads: int  # KV heads of a sequence
    group: int  # query heads of each
    d: int
    relative_to: str
    tolerance: float
    aim: float  # of the tolerance
    pooled: bool
    coarse_fee: float
    host_fee: float
    max_promoted: float
    refresh: int  # steps after which a plan is made anew
    least: float  # share of an estimate that a bound is taken to come to
    summed: float  # what sums may add, `certjax.fused.bound.summing`


def choose(
    stats: jax.Array,  # [H, NT, 4, C] of the scan
    weights: jax.Array,  # [H, NT, C, 128] of the scan
    record: jax.Array,  # [H, ROWS, C], what came of the plan before
    before: jax.Array,  # [H, flags] int32, that plan
    notes: dict[str, jax.Array],  # peaks and spectral norms, [L, H, NT, ...] bfloat16
    facts: jax.Array,  # [H, 4, C] of `prepare_queries`
    meta: jax.Array,  # [H, 3] int32
    layer: jax.Array,  # [1] int32
    terms: Terms,
) -> tuple[jax.Array, list[jax.Array], jax.Array]:
    """What is asked for, `[H]` int32 (`judge.record`); how much a second pass reads of every tile, `[H, flags]` int32,
    with its `counts` `[H, COUNTS]` and the `summary` of chunks (`pallas_kernels.levels`), both 0 where it is not asked
    for; and the plan for the next step, `[H, flags]` int32."""
    heads, n_tiles, _, columns = stats.shape
    chunks, flags, d = -(-n_tiles // CHUNK), before.shape[1], terms.d
    i32, f32 = jnp.int32, jnp.float32
    of_row = dict(HEADS=terms.heads, HEADS_UP=triton.next_power_of_2(terms.heads))
    common = dict(
        NT=n_tiles, C=columns, POOLED=terms.pooled, COARSE_FEE=terms.coarse_fee, HOST_FEE=terms.host_fee,
        GROUP=terms.group, PIECES=lv.pieces_of_a_tile(d), T=CHUNK,
    )  # fmt: skip
    asked, costs, shares, left = launch(
        _offer, stats, *(notes[x] for x in NOTES), facts, record, before, meta, layer,
        out=[
            jax.ShapeDtypeStruct((heads,), i32),
            jax.ShapeDtypeStruct((heads, 4, n_tiles), f32),
            jax.ShapeDtypeStruct((heads, n_tiles, columns // 2), f32),
            jax.ShapeDtypeStruct((heads, chunks, ROWS_OF_PRICES.value, columns // 2), f32),
        ],
        grid=(heads, chunks), warps=8, H=heads, CHUNKS=chunks, RELATIVE_TO=terms.relative_to,
        TOLERANCE=terms.tolerance, AIM=terms.aim, SUMMED=terms.summed, REFRESH=terms.refresh,
        FLAGS=flags, **of_row, **common,
    )  # fmt: skip
    numbers = lv.length_of_summary(flags)
    *fresh, held = launch(
        _settle, costs, left, shares, weights, meta, asked, before,
        out=[jax.ShapeDtypeStruct((heads, n), i32) for n in (flags, COUNTS.value, numbers, flags)],
        grid=(heads, -(-flags // CHUNK)), warps=8, FLAGS=flags, N_CHUNKS=chunks, MAX_PROMOTED=terms.max_promoted,
        LEAST=terms.least,
        **of_row, **common,
    )  # fmt: skip
    return asked, fresh, held
