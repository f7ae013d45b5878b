"""Which tiles to read, and at which level. Twin: `certjax.fused.plan.choose`.

Two kernels, as the second needs sums over what the first found: `_offer` says what is asked for at all, what each tile
would add to the bound and what is left of a layer's at every price, `_settle` takes the highest price that fits. These
are estimates: they decide what is read and nothing else. Where nothing more is read, `_settle` gives the verdict.
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
from pallas_kernels.judge.contract import Contract, checks_failed, fits_as_it_is
from pallas_kernels.judge.record import E_TOTAL, FROM_CENTRE, L_MINUS, NORM, NU_MEAN, PASSED, ROWS, TOTAL
from pallas_kernels.launch import launch
from pallas_kernels.tile_facts import (
    NOTES,
    key_terms,
    linear_value_terms,
    load_sums,
    number,
    tile_sums,
)

PRICES, STEPS, ROWS_OF_PRICES = tl.constexpr(62), tl.constexpr(4), tl.constexpr(64)
"""Candidates for the price of reading a tile at its finest, in shares of a layer's tolerance: so many, so many to a
factor of two. Behind what is left at each of them come what the bound came to by the plan before, and what is estimated
of it."""

COUNTS = tl.constexpr(lv.COUNTS)
ACTIVE, N_COARSE, N_VALUES = tl.constexpr(lv.ACTIVE), tl.constexpr(lv.N_COARSE), tl.constexpr(lv.N_VALUES)
N_FINEST, N_PROMOTED, GIVE_UP = tl.constexpr(lv.N_FINEST), tl.constexpr(lv.N_PROMOTED), tl.constexpr(lv.GIVE_UP)
LEVELS = tl.constexpr(lv.PROMOTED + 1)
COARSE_FEE, VALUES_FEE = tl.constexpr(lv.FEES[lv.COARSE]), tl.constexpr(lv.FEES[lv.VALUES])
SKIP, COARSE, VALUES, FINEST = (tl.constexpr(x) for x in (lv.SKIP, lv.COARSE, lv.VALUES, lv.FINEST))
PROMOTED, WHOLE = tl.constexpr(lv.PROMOTED), tl.constexpr(lv.PROMOTED + 1)
"""Levels while they are chosen: some pieces of a tile, all of them."""

KEPT, ANEW, REDO = tl.constexpr(rc.KEPT), tl.constexpr(rc.ANEW), tl.constexpr(rc.REDO)

CHUNK, LOOK, TILES_READ = lv.CHUNK, tl.constexpr(lv.LOOK), tl.constexpr(lv.TILES_READ)
AT_ONCE = tl.constexpr(8)
"""Promoted tiles whose pieces are chosen at once."""

LARGEST = tl.constexpr(1e30)


@triton.jit
def _offer(
    stats, kappa, eta, nu, sigma_k, sigma_v, rho_k, rho_v, facts, record, before, meta, layer,  # inputs
    asked, costs, shares, left,  # outputs
    H: tl.constexpr, HEADS: tl.constexpr, HEADS_UP: tl.constexpr, CHUNKS: tl.constexpr, NT: tl.constexpr,
    GROUP: tl.constexpr, C: tl.constexpr, T: tl.constexpr, RELATIVE_TO: tl.constexpr, TOLERANCE: tl.constexpr,
    AIM: tl.constexpr, POOLED: tl.constexpr, HOST_FEE: tl.constexpr, PIECES: tl.constexpr, SUMMED: tl.constexpr,
    REFRESH: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    h, chunk, at = tl.program_id(0), tl.program_id(1), tl.load(layer)
    row, col = tl.arange(0, HEADS_UP)[:, None], tl.arange(0, C)
    shown = (row < HEADS) & (col < GROUP)[None]
    of = record + (h // HEADS * HEADS + row) * ROWS * C + col[None]
    norm, bound = tl.load(of + NORM * C, mask=shown, other=0.0), tl.load(of + E_TOTAL * C, mask=shown, other=0.0)
    length = tl.load(meta + h * 3 + 2)
    fits = fits_as_it_is(norm, bound, shown, TOLERANCE, RELATIVE_TO, POOLED, HEADS * GROUP)
    what = tl.where(fits, tl.where((length + at) % REFRESH == 0, ANEW, KEPT), REDO)
    if chunk == 0:
        tl.store(asked + h, what)
    if what != KEPT:
        _offer_tiles(
            stats, kappa, eta, nu, sigma_k, sigma_v, rho_k, rho_v, facts, record, before, norm, meta, at, costs, shares,
            left, H, HEADS, CHUNKS, NT, GROUP, C, T, RELATIVE_TO, AIM * TOLERANCE, POOLED, HOST_FEE, PIECES, SUMMED,
            FLAGS,
        )  # fmt: skip


@triton.jit
def _offer_tiles(
    stats, kappa, eta, nu, sigma_k, sigma_v, rho_k, rho_v, facts, record, before, norms, meta, at,  # inputs
    costs, shares, left,  # outputs
    H: tl.constexpr, HEADS: tl.constexpr, CHUNKS: tl.constexpr, NT: tl.constexpr, GROUP: tl.constexpr,
    C: tl.constexpr, T: tl.constexpr, RELATIVE_TO: tl.constexpr, TOLERANCE: tl.constexpr, POOLED: tl.constexpr,
    HOST_FEE: tl.constexpr, PIECES: tl.constexpr, SUMMED: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    h, chunk = tl.program_id(0), tl.program_id(1)
    col, t = tl.arange(0, C), chunk * T + tl.arange(0, T)
    # Everything is loaded first: a load that comes after a sum over several warps waits for it.
    q_norm, eps = tl.load(facts + h * 4 * C + col), tl.load(facts + h * 4 * C + C + col)
    of = record + h * ROWS * C + col
    own, total, l_minus = tl.load(of + NORM * C), tl.load(of + TOTAL * C), tl.load(of + L_MINUS * C)
    from_centre, nu_mean = tl.load(of + FROM_CENTRE * C), tl.load(of + NU_MEAN * C)
    came_to = tl.load(of + E_TOTAL * C)
    first, end = tl.load(meta + h * 3), tl.load(meta + h * 3 + 1)
    active, there = (t >= first) & (t < end), t < NT
    noted = (at * H + h) * NT + t
    loaded = load_sums(stats, h * NT + t, there, C)
    now = tl.load(before + h * FLAGS + t, mask=active, other=0)
    now = tl.where(now == (PROMOTED | ((2**PIECES - 1) << 8)), WHOLE, now & 255)
    nu_peak = number(nu + noted, active)
    kappa_0, kappa_1 = number(kappa + noted * 2, active), number(kappa + noted * 2 + 1, active)
    sigma_k0, sigma_k1 = number(sigma_k + noted * 2, active), number(sigma_k + noted * 2 + 1, active)
    rho_k0, rho_k1 = number(rho_k + noted * 2, active), number(rho_k + noted * 2 + 1, active)
    eta_0, eta_1 = number(eta + noted * 2, active)[:, None], number(eta + noted * 2 + 1, active)[:, None]
    rho_v0, rho_v1 = number(rho_v + noted * 2, active)[:, None], number(rho_v + noted * 2 + 1, active)[:, None]
    sigma_v0, sigma_v1 = number(sigma_v + noted * 3, active)[:, None], number(sigma_v + noted * 3 + 1, active)[:, None]
    sigma_v2 = number(sigma_v + noted * 3 + 2, active)[:, None]
    a, n, norm, scaled, keyed, keyed_n = tile_sums(loaded, nu_peak, active)

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
    o_skip = tl.where(shown, least(no_nan((coarse_keys + skipped) * of_total * of_room), LARGEST), 0.0)
    o_coarse = tl.where(shown, least(no_nan((coarse_keys + coarse) * of_total * of_room), LARGEST), 0.0)
    o_values = tl.where(shown, least(no_nan((coarse_keys + fine) * of_total * of_room), LARGEST), 0.0)
    o_finest = tl.where(shown, least(no_nan((fine_keys + fine) * of_total * of_room), LARGEST), 0.0)
    heaviest = norm / most(a, 2.0**-120)
    o_some = o_finest * (1 - heaviest * heaviest)  # what may be left once the heaviest token's piece is read
    c_skip, c_coarse = _of_group(o_skip, POOLED, GROUP), _of_group(o_coarse, POOLED, GROUP)
    c_values, c_finest = _of_group(o_values, POOLED, GROUP), _of_group(o_finest, POOLED, GROUP)
    c_some = _of_group(o_some, POOLED, GROUP)
    to = costs + h * LEVELS * NT + t
    tl.store(to, c_skip, mask=t < NT)
    tl.store(to + COARSE * NT, c_coarse, mask=t < NT)
    tl.store(to + VALUES * NT, c_values, mask=t < NT)
    tl.store(to + FINEST * NT, c_finest, mask=t < NT)
    tl.store(to + PROMOTED * NT, c_some, mask=t < NT)
    to = shares + (h * NT + t[:, None]) * (C // 2) + col[None]
    tl.store(to, o_finest, mask=(t < NT)[:, None] & (col < C // 2)[None])

    j = tl.arange(0, ROWS_OF_PRICES)
    price = tl.exp2(-j.to(tl.float32) / STEPS)[:, None]
    level = _levels(
        c_skip[None], c_coarse[None], c_values[None], c_finest[None], c_some[None], price, HOST_FEE, PIECES
    )  # [J, T]
    level = tl.where((j < PRICES)[:, None], level, now[None])
    # Sums over tiles by the matrix unit; estimates may be off by the 2^-9 of its operands.
    remains = product((level == SKIP).to(tl.float32), rounded(o_skip))
    remains += product((level == COARSE).to(tl.float32), rounded(o_coarse))
    remains += product((level == VALUES).to(tl.float32), rounded(o_values))
    remains += product((level == FINEST).to(tl.float32), rounded(o_finest))
    remains += product((level == PROMOTED).to(tl.float32), rounded(o_some))
    if chunk == 0:
        rounding = 1.25 * expm1_up(eps) * (nu_mean + h_bar) + SUMMED * nu_mean
        remains += tl.where(col < GROUP, no_nan(rounding / room), 0.0)[None]
    came_to = tl.where((col < GROUP) & (chunk == 0), came_to / room, 0.0)
    remains = tl.where((j == PRICES)[:, None], came_to[None], remains)
    to = left + ((h * CHUNKS + chunk) * ROWS_OF_PRICES + j[:, None]) * (C // 2) + col[None]
    tl.store(to, remains, mask=(col < C // 2)[None])


@triton.jit
def _of_group(shares, POOLED: tl.constexpr, GROUP: tl.constexpr):
    """[T, C] -> [T]."""
    return tl.sqrt(tl.sum(shares * shares, 1) * (1 / GROUP)) if POOLED else tl.max(shares, 1)


@triton.jit
def _levels(skip, coarse, values, finest, some, price, HOST_FEE: tl.constexpr, PIECES: tl.constexpr):  # fmt: skip
    """Whichever is the least, its fee included; PROMOTED for a piece, WHOLE for all."""
    coarse, values, finest = coarse + COARSE_FEE * price, values + VALUES_FEE * price, finest + price
    lowest = tl.minimum(tl.minimum(skip, coarse), tl.minimum(values, finest))
    level = tl.where(coarse <= lowest, COARSE, tl.where(values <= lowest, VALUES, FINEST))
    level = tl.where(skip <= lowest, SKIP, level)
    some = some + price * (1 + HOST_FEE / PIECES)
    level = tl.where(some < lowest, PROMOTED, level)
    return tl.where(price * HOST_FEE < tl.minimum(lowest, some), WHOLE, level)


@triton.jit
def _level_at(costs, h, t, active, price, NT: tl.constexpr, HOST_FEE: tl.constexpr, PIECES: tl.constexpr):
    of = costs + h * LEVELS * NT + t
    return _levels(
        tl.load(of, mask=active, other=0.0), tl.load(of + COARSE * NT, mask=active, other=0.0),
        tl.load(of + VALUES * NT, mask=active, other=0.0), tl.load(of + FINEST * NT, mask=active, other=0.0),
        tl.load(of + PROMOTED * NT, mask=active, other=0.0), price, HOST_FEE, PIECES,
    )  # fmt: skip


@triton.jit
def _settle(
    costs, left, shares, weights, meta, asked, before, record, sound,  # inputs
    words, counts, summary, held, dense,  # outputs
    HEADS: tl.constexpr, HEADS_UP: tl.constexpr, NT: tl.constexpr, FLAGS: tl.constexpr,
    N_CHUNKS: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, T: tl.constexpr, POOLED: tl.constexpr,
    HOST_FEE: tl.constexpr, PIECES: tl.constexpr, MAX_PROMOTED: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """A new plan where one is asked for, what the cache keeps for the next step, and a verdict on what stays."""
    h, own = tl.program_id(0), tl.program_id(1)
    t = own * T + tl.arange(0, T)
    what, past = tl.load(asked + h), tl.load(before + h * FLAGS + t, mask=t < FLAGS, other=0)
    first, end = tl.load(meta + h * 3), tl.load(meta + h * 3 + 1)
    row, col = tl.arange(0, HEADS_UP)[:, None], tl.arange(0, C)[None]
    of, shown = record + (h // HEADS * HEADS + row) * ROWS * C + col, (row < HEADS) & (col < GROUP)
    norm, passed = tl.load(of + NORM * C, mask=shown, other=0.0), tl.load(of + PASSED * C, mask=shown, other=1.0)
    verdict = 2 * checks_failed(norm, passed, tl.load(sound + h // HEADS))
    verdict = tl.where(what == REDO, tl.maximum(verdict, 1), verdict)  # dense, if nobody decides
    if own == 0:
        tl.store(dense + h, verdict)
    active = (t >= first) & (t < end)
    if what != KEPT:
        _settle_tiles(
            costs, left, shares, weights, meta, what, words, counts, summary, held, HEADS, HEADS_UP, NT, FLAGS,
            N_CHUNKS, GROUP, C, T, POOLED, HOST_FEE, PIECES, MAX_PROMOTED, LEAST,
        )  # fmt: skip
    else:
        tl.store(held + h * FLAGS + t, tl.where(active, past, COARSE), mask=t < FLAGS)
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
    GROUP: tl.constexpr, C: tl.constexpr, T: tl.constexpr, POOLED: tl.constexpr, HOST_FEE: tl.constexpr,
    PIECES: tl.constexpr, MAX_PROMOTED: tl.constexpr, LEAST: tl.constexpr,
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
    n_coarse, n_values = tl.zeros((T,), tl.int32), tl.zeros((T,), tl.int32)
    n_finest, n_promoted = tl.zeros((T,), tl.int32), tl.zeros((T,), tl.int32)
    mine = tl.zeros((T,), tl.int32)
    for start in tl.range(0, NT, T, loop_unroll_factor=4):
        t = start + tile
        active = (t >= first) & (t < end)
        level = _level_at(costs, h, t, active, price, NT, HOST_FEE, PIECES)
        level = tl.where(active, level, SKIP)
        mine = tl.where(start == own * T, level, mine)
        n_coarse += (level == COARSE).to(tl.int32)
        n_values += (level == VALUES).to(tl.int32)
        n_finest += (level == FINEST).to(tl.int32)
        n_promoted += (level >= PROMOTED).to(tl.int32)
    n_active, n_promoted = tl.maximum(end - first, 0), tl.sum(n_promoted, 0)
    stays = tl.where((n_promoted <= MAX_PROMOTED * n_active.to(tl.float32)) & (dearer < PRICES), 1, 0)
    mine *= stays
    redo = tl.where(what == REDO, 1, 0)
    if own == 0:
        to = counts + h * COUNTS
        tl.store(to + ACTIVE, n_active * redo)
        tl.store(to + N_COARSE, tl.sum(n_coarse, 0) * stays * redo)
        tl.store(to + N_VALUES, tl.sum(n_values, 0) * stays * redo)
        tl.store(to + N_FINEST, tl.sum(n_finest, 0) * stays * redo)
        tl.store(to + N_PROMOTED, n_promoted * stays * redo)
        tl.store(to + GIVE_UP, (1 - stays) * redo)

    # Which pieces: each would add its share of the tile's weights.
    word = tl.where(mine == WHOLE, PROMOTED | ((2**PIECES - 1) << 8), mine)
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
        left_over = tl.load(costs + (h * LEVELS + PROMOTED) * NT + at, mask=valid, other=0.0)
        dear = (~(rest <= left_over[:, None])).to(tl.int32)
        bits = PROMOTED | (tl.sum(dear << piece[None], 1) << 8)
        chosen = tl.sum(tl.where(found, bits[:, None], 0), 0)
        word = tl.where(chosen > 0, chosen, word)
        done += AT_ONCE
    t = own * T + tile
    tl.store(words + h * FLAGS + t, word, mask=t < FLAGS)
    known = (t >= first) & (t < end) & (stays > 0)
    tl.store(held + h * FLAGS + t, tl.where(known, word, COARSE), mask=t < FLAGS)
    n = tl.sum((((word >> 8)[:, None] >> piece[None]) & 1), 1)
    n += tl.where((mine == FINEST) | ((mine >= PROMOTED) & (n < PIECES)), TILES_READ, 0)
    block = tl.arange(0, T // LOOK)
    of_block = tl.sum(tl.reshape(n, (T // LOOK, LOOK)), 1) * redo
    tl.store(summary + (h * tl.num_programs(1) + own) * (T // LOOK) + block, of_block)


@dataclasses.dataclass(frozen=True)
class Terms:
    """Of a policy and a shape, what the plan depends on. Fees are in tiles read at their finest."""

    contract: Contract
    d: int
    aim: float  # of the tolerance
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
    sound: jax.Array,  # [b] bool
    terms: Terms,
) -> tuple[jax.Array, list[jax.Array], jax.Array, jax.Array]:
    """What is asked for, `[H]` int32 (`judge.record`); how much a second pass reads of every tile, `[H, flags]` int32,
    with its `counts` `[H, COUNTS]` and the `summary` of chunks (`pallas_kernels.levels`), both 0 where it is not asked
    for; the plan for the next step, `[H, flags]` int32; and where it is not asked for a verdict on each head, `[H]`
    int32: 0 stays, 1 dense, 2 dense as a check of its row failed."""
    heads, n_tiles, _, columns = stats.shape
    chunks, flags, d = -(-n_tiles // CHUNK), before.shape[1], terms.d
    i32, f32 = jnp.int32, jnp.float32
    contract = terms.contract.constants
    common = dict(
        NT=n_tiles, C=columns, HOST_FEE=terms.host_fee, GROUP=terms.contract.group, PIECES=lv.pieces_of_a_tile(d),
        T=CHUNK, **{x: contract[x] for x in ("HEADS", "HEADS_UP", "POOLED")},
    )  # fmt: skip
    asked, costs, shares, left = launch(
        _offer, stats, *(notes[x] for x in NOTES), facts, record, before, meta, layer,
        out=[
            jax.ShapeDtypeStruct((heads,), i32),
            jax.ShapeDtypeStruct((heads, LEVELS.value, n_tiles), f32),
            jax.ShapeDtypeStruct((heads, n_tiles, columns // 2), f32),
            jax.ShapeDtypeStruct((heads, chunks, ROWS_OF_PRICES.value, columns // 2), f32),
        ],
        grid=(heads, chunks), warps=8, H=heads, CHUNKS=chunks, AIM=terms.aim, SUMMED=terms.summed,
        REFRESH=terms.refresh, FLAGS=flags, **{x: contract[x] for x in ("RELATIVE_TO", "TOLERANCE")}, **common,
    )  # fmt: skip
    numbers = lv.length_of_summary(flags)
    *fresh, held, dense = launch(
        _settle, costs, left, shares, weights, meta, asked, before, record, sound,
        out=[
            *[jax.ShapeDtypeStruct((heads, n), i32) for n in (flags, COUNTS.value, numbers, flags)],
            jax.ShapeDtypeStruct((heads,), i32),
        ],
        grid=(heads, -(-flags // CHUNK)), warps=4, FLAGS=flags, N_CHUNKS=chunks,
        MAX_PROMOTED=terms.max_promoted, LEAST=terms.least, **common,
    )  # fmt: skip
    return asked, fresh, held, dense
