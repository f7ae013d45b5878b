"""Which tiles to read, and at which level. Twin: `certjax.fused.plan.choose`.

Three kernels, as each needs sums over what the one before found: `_weigh` adds up the tiles of chunks, `_offer` says
what each tile would add to the bound and what is left of a layer's at every price, `_settle` takes the highest price
that fits. These are estimates: they decide what is read and nothing else.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import levels as lv
from pallas_kernels.device_math import exp_down, expm1_up, least, most, no_nan, product, rounded
from pallas_kernels.launch import launch
from pallas_kernels.tile_facts import (
    NOTES,
    add_originals,
    key_terms,
    keyed_sums,
    linear_value_terms,
    number,
    tile_sums,
)

PRICES, STEPS = tl.constexpr(64), tl.constexpr(4)
"""Candidates for the price of reading a tile at its finest, in shares of a layer's tolerance: so many, so many to a
factor of two."""

FIELDS = tl.constexpr(5)
"""Of a part of a head, from `_weigh`. Of a chunk of tiles: sums of w, of w nu, of the squares of what is not seen yet
as a share of the first, of what scores may hide. Of the windows: sum of w, largest nu, and of m, their mean value less
the centre, its square, its product with the centre, the centre's square."""

COUNTS = tl.constexpr(lv.COUNTS)
PROMOTED, WHOLE = tl.constexpr(lv.PROMOTED), tl.constexpr(lv.PROMOTED + 1)
"""Levels while they are chosen: some pieces of a tile, all of them."""

CHUNK, TILES_READ = lv.CHUNK, tl.constexpr(lv.TILES_READ)
AT_ONCE = tl.constexpr(8)
"""Promoted tiles whose pieces are chosen at once."""

LARGEST = tl.constexpr(1e30)


@triton.jit
def _weigh(
    stats, window_acc, window_sums, kappa, nu, facts, largest_of_head, value_centre, meta, layer,  # inputs
    weighed,  # output
    H: tl.constexpr, NT: tl.constexpr, W: tl.constexpr, C: tl.constexpr, D: tl.constexpr, T: tl.constexpr,
    HIGHEST: tl.constexpr,
):  # fmt: skip
    h, chunk, at = tl.program_id(0), tl.program_id(1), tl.load(layer)
    n_parts, col = tl.num_programs(1), tl.arange(0, C)
    to = weighed + (h * n_parts + chunk) * FIELDS * C + col
    if chunk < n_parts - 1:
        t = chunk * T + tl.arange(0, T)
        active = (t >= tl.load(meta + h * 3)) & (t < tl.load(meta + h * 3 + 1))
        noted = (at * H + h) * NT + t
        delta = tl.load(facts + h * 4 * C + col)[None] * number(kappa + noted * 2, active)[:, None]
        a, n, norm, scaled = tile_sums(stats, h * NT + t, number(nu + noted, active), active, C)
        total = tl.sum(a, 0)
        # Values not seen yet are taken to point anywhere: their squares add up. What is squared is a share first:
        # weights may be so small that their squares vanish.
        unseen = norm * (1 / most(total, 2.0**-120))[None] * (n / most(a, 2.0**-100))
        lost = a * (1 - exp_down(-least(delta, 80.0)))
        tl.store(to, total)
        tl.store(to + C, tl.sum(n, 0))
        tl.store(to + 2 * C, tl.sum(unseen * unseen, 0))
        tl.store(to + 3 * C, tl.sum(lost, 0))
    else:
        centre = tl.load(value_centre + (at * H + h) * D + tl.arange(0, D))[:, None]
        longest_centre = tl.load(largest_of_head + (at * 6 + 5) * H + h)
        exact, total, longest_key, longest = add_originals(window_acc, window_sums, h * W, W, 1, D, C, HIGHEST)
        moved = tl.where((total > 0)[None], exact / total[None] - centre, 0.0)
        tl.store(to, total)
        tl.store(to + C, tl.sqrt(longest) + longest_centre)
        tl.store(to + 2 * C, tl.sum(moved * moved, 0))
        tl.store(to + 3 * C, tl.sum(moved * centre, 0))
        tl.store(to + 4 * C, tl.full((C,), 1.0, tl.float32) * tl.sum(tl.sum(centre * centre, 1), 0))


@triton.jit
def _of_chunks(weighed, field, head, CHUNKS: tl.constexpr, CHUNKS_UP: tl.constexpr, C: tl.constexpr, here):
    """Of heads' chunks of tiles, [heads, chunks, C]."""
    chunk = tl.arange(0, CHUNKS_UP)[None, :, None]
    of = weighed + ((head[:, None, None] * (CHUNKS + 1) + chunk) * FIELDS + field) * C + tl.arange(0, C)[None, None]
    return tl.load(of, mask=here[:, None, None] & (chunk < CHUNKS), other=0.0)


@triton.jit
def _of_windows(weighed, field, head, CHUNKS: tl.constexpr, C: tl.constexpr, here):
    of = weighed + ((head[:, None] * (CHUNKS + 1) + CHUNKS) * FIELDS + field) * C + tl.arange(0, C)[None]
    return tl.load(of, mask=here[:, None], other=0.0)


@triton.jit
def _own(x, mine):
    """The row of a program's own head."""
    return tl.sum(tl.where(mine[:, None], x, 0.0), 0)


@triton.jit
def _offer(
    stats, kappa, eta, nu, sigma_k, sigma_v, rho_k, rho_v, facts, weighed, aim, meta, layer,  # inputs
    costs, shares, left,  # outputs
    H: tl.constexpr, HEADS: tl.constexpr, HEADS_UP: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_UP: tl.constexpr,
    NT: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, T: tl.constexpr, RELATIVE_TO: tl.constexpr,
    TOLERANCE: tl.constexpr, MARGIN: tl.constexpr, POOLED: tl.constexpr, COARSE_FEE: tl.constexpr,
    HOST_FEE: tl.constexpr, PIECES: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    h, chunk, at = tl.program_id(0), tl.program_id(1), tl.load(layer)
    col, t = tl.arange(0, C), chunk * T + tl.arange(0, T)
    row = tl.arange(0, HEADS_UP)
    head, here, mine = h // HEADS * HEADS + row, row < HEADS, row == h % HEADS
    # Everything is loaded first: a load that comes after a sum over several warps waits for it.
    weight = _of_chunks(weighed, 0, head, CHUNKS, CHUNKS_UP, C, here)
    weight_nu = _of_chunks(weighed, 1, head, CHUNKS, CHUNKS_UP, C, here)
    square_of_chunk = _of_chunks(weighed, 2, head, CHUNKS, CHUNKS_UP, C, here)
    lost = _of_chunks(weighed, 3, head, CHUNKS, CHUNKS_UP, C, here)
    exact, exact_nu = _of_windows(weighed, 0, head, CHUNKS, C, here), _of_windows(weighed, 1, head, CHUNKS, C, here)
    moved, along = _of_windows(weighed, 2, head, CHUNKS, C, here), _of_windows(weighed, 3, head, CHUNKS, C, here)
    centre = _of_windows(weighed, 4, head, CHUNKS, C, here)
    tolerance = MARGIN * TOLERANCE * tl.load(aim + at * (H // HEADS) + h // HEADS)
    q_norm, eps = tl.load(facts + h * 4 * C + col), tl.load(facts + h * 4 * C + C + col)
    first, end = tl.load(meta + h * 3), tl.load(meta + h * 3 + 1)
    active = (t >= first) & (t < end)
    noted = (at * H + h) * NT + t
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

    total = tl.sum(weight, 1) + exact
    share = weight / total[:, None]
    unseen = tl.sum(square_of_chunk * (share * share), 1)
    share = exact / total
    from_centre = moved * (share * share) + unseen
    squares = tl.where(here[:, None], from_centre + 2 * along * share + centre, 0.0)
    if RELATIVE_TO == "absolute":
        room = tl.full((C,), 1.0, tl.float32) * tolerance
    else:
        if RELATIVE_TO == "layer":
            in_group = tl.where((col < GROUP)[None], squares, 0.0)
            square = tl.full((C,), 1.0, tl.float32) * (tl.sum(tl.sum(in_group, 1), 0) / (HEADS * GROUP))
        else:
            square = _own(squares, mine)
        room = tl.where(square < float("inf"), tolerance * tl.sqrt(square), 0.0)
    h_bar = tl.sqrt(_own(from_centre, mine)) + 2 * room  # what the values may add to it
    nu_mean = _own((tl.sum(weight_nu, 1) + exact * exact_nu) / total, mine)
    l_minus = 1 - _own(tl.sum(lost, 1) / total, mine)
    total = _own(total, mine)
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

    j = tl.arange(0, PRICES)
    price = tl.exp2(-j.to(tl.float32) / STEPS)[:, None]
    level = _levels(c0[None], c1[None], c2[None], c3[None], price, COARSE_FEE, HOST_FEE, PIECES)  # [J, T]
    # Sums over tiles by the matrix unit; estimates may be off by the 2^-9 of its operands.
    remains = product((level == 0).to(tl.float32), rounded(o0)) + product((level == 1).to(tl.float32), rounded(o1))
    remains += product((level == 2).to(tl.float32), rounded(o2)) + product((level == 3).to(tl.float32), rounded(o3))
    if chunk == 0:
        rounding = 1.25 * expm1_up(eps) * (nu_mean + h_bar) + SUMMED * nu_mean
        remains += tl.where(col < GROUP, no_nan(rounding / room), 0.0)[None]
    to = left + ((h * CHUNKS + chunk) * PRICES + j[:, None]) * (C // 2) + col[None]
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
    costs, left, shares, weights, meta,  # inputs
    words, counts, summary,  # outputs
    HEADS: tl.constexpr, HEADS_UP: tl.constexpr, NT: tl.constexpr, FLAGS: tl.constexpr, N_CHUNKS: tl.constexpr,
    GROUP: tl.constexpr, C: tl.constexpr, T: tl.constexpr, POOLED: tl.constexpr, COARSE_FEE: tl.constexpr,
    HOST_FEE: tl.constexpr, PIECES: tl.constexpr, MAX_PROMOTED: tl.constexpr,
):  # fmt: skip
    h, own = tl.program_id(0), tl.program_id(1)
    j, col, tile = tl.arange(0, PRICES), tl.arange(0, C // 2), tl.arange(0, T)
    row = tl.arange(0, HEADS_UP)[:, None, None]
    remains = tl.zeros((HEADS_UP, PRICES, C // 2), tl.float32)
    for chunk in tl.static_range(N_CHUNKS):
        of = ((h // HEADS * HEADS + row) * N_CHUNKS + chunk) * PRICES + j[None, :, None]
        remains += tl.load(left + of * (C // 2) + col[None, None], mask=row < HEADS, other=0.0)
    squares = tl.sum(tl.sum(remains * remains, 2), 0)
    worst = squares * (1 / (HEADS * GROUP)) if POOLED else tl.max(tl.max(remains, 2), 0)
    # What is left falls with the price: the first that fits comes after those that do not.
    dearer = tl.sum((~(worst <= 1)).to(tl.int32), 0)
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
    if own == 0:
        to = counts + h * COUNTS
        tl.store(to, n_active)
        tl.store(to + 1, tl.sum(n_coarse, 0) * stays)
        tl.store(to + 2, tl.sum(n_finest, 0) * stays)
        tl.store(to + 3, n_promoted * stays)
        tl.store(to + 4, 1 - stays)

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
    n = tl.sum((((word >> 8)[:, None] >> piece[None]) & 1), 1)
    n += tl.where((mine == 2) | ((mine >= PROMOTED) & (n < PIECES)), TILES_READ, 0)
    tl.store(summary + h * tl.num_programs(1) + own, tl.sum(n, 0))


@dataclasses.dataclass(frozen=True)
class Terms:
    """Of a policy and a shape, what the plan depends on. Fees are in tiles read at their finest."""

    heads: int  # KV heads of a sequence
    group: int  # query heads of each
    relative_to: str
    tolerance: float
    margin: float
    pooled: bool
    coarse_fee: float
    host_fee: float
    max_promoted: float
    highest: float
    summed: float  # what sums may add, `certjax.fused.bound.summing`


def choose(
    scan: tuple[jax.Array, ...],  # stats [H, NT, 4, C], weights [H, NT, C, 128], acc [H, W, d, C], sums [H, W, 4, C]
    notes: dict[str, jax.Array],  # peaks and spectral norms, [L, H, NT, ...] bfloat16
    facts: jax.Array,  # [H, 4, C] of `prepare_queries`
    largest: jax.Array,  # [L, 6, H]
    value_centre: jax.Array,  # [L, H, d] float32
    aim: jax.Array,  # [L, b] float32, see `certjax.fused.aim`
    meta: jax.Array,  # [H, 3] int32
    layer: jax.Array,  # [1] int32
    terms: Terms,
    flags: int,  # length of a head's row of flags, at least NT
) -> list[jax.Array]:
    """How much is read of every tile, `[H, flags]` int32; `counts` `[H, COUNTS]`; and the `summary` of chunks
    (`pallas_kernels.levels`)."""
    stats, weights, acc, sums = scan
    heads, n_tiles, _, columns = stats.shape
    chunks = -(-n_tiles // CHUNK)
    f32 = jnp.float32
    shape = dict(NT=n_tiles, C=columns)
    weighed = launch(
        _weigh, stats, acc, sums, notes["kappa"], notes["nu"], facts, largest, value_centre, meta, layer,
        out=jax.ShapeDtypeStruct((heads, chunks + 1, FIELDS.value, columns), f32), grid=(heads, chunks + 1), H=heads,
        W=acc.shape[1], D=acc.shape[2], T=CHUNK, HIGHEST=terms.highest,
        **shape,
    )  # fmt: skip
    of_row = dict(HEADS=terms.heads, HEADS_UP=triton.next_power_of_2(terms.heads))
    fees = dict(
        POOLED=terms.pooled, COARSE_FEE=terms.coarse_fee, HOST_FEE=terms.host_fee, GROUP=terms.group,
        PIECES=lv.pieces_of_a_tile(acc.shape[2]),
    )  # fmt: skip
    costs, shares, left = launch(
        _offer, stats, *(notes[x] for x in NOTES), facts, weighed, aim, meta, layer,
        out=[
            jax.ShapeDtypeStruct((heads, 4, n_tiles), f32),
            jax.ShapeDtypeStruct((heads, n_tiles, columns // 2), f32),
            jax.ShapeDtypeStruct((heads, chunks, PRICES.value, columns // 2), f32),
        ],
        grid=(heads, chunks), warps=8, H=heads, CHUNKS=chunks, CHUNKS_UP=triton.next_power_of_2(chunks), T=CHUNK,
        RELATIVE_TO=terms.relative_to, TOLERANCE=terms.tolerance, MARGIN=terms.margin,
        SUMMED=terms.summed, **of_row, **fees, **shape,
    )  # fmt: skip
    own = lv.length_of_summary(flags)
    i32 = [jax.ShapeDtypeStruct((heads, n), jnp.int32) for n in (flags, COUNTS.value, own)]
    return launch(
        _settle, costs, left, shares, weights, meta, out=i32, grid=(heads, own), warps=8, FLAGS=flags, N_CHUNKS=chunks,
        T=CHUNK, MAX_PROMOTED=terms.max_promoted, **of_row, **fees, **shape,
    )
