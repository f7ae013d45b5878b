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

COUNTS = tl.constexpr(5)
CHUNK = 128
"""Tiles that a program of `_offer` looks at."""

LARGEST = tl.constexpr(1e30)


@triton.jit
def _weigh(
    stats, window_acc, window_sums, kappa, nu, facts, largest_of_head, value_centre, meta, layer,  # inputs
    weighed,  # output
    H: tl.constexpr, NT: tl.constexpr, W: tl.constexpr, W_UP: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    T: tl.constexpr, HIGHEST: tl.constexpr,
):  # fmt: skip
    h, chunk, at = tl.program_id(0), tl.program_id(1), tl.load(layer)
    n_parts, col = tl.num_programs(1), tl.arange(0, C)
    to = weighed + (h * n_parts + chunk) * FIELDS * C + col
    if chunk < n_parts - 1:
        t = chunk * T + tl.arange(0, T)
        active = (t >= tl.load(meta + h * 3)) & (t < tl.load(meta + h * 3 + 1))
        noted = (at * H + h) * NT + t
        a, n, norm, scaled = tile_sums(stats, h * NT + t, number(nu + noted, active), active, C)
        total = tl.sum(a, 0)
        # Values not seen yet are taken to point anywhere: their squares add up. What is squared is a share first:
        # weights may be so small that their squares vanish.
        unseen = norm * (1 / most(total, 2.0**-120))[None] * (n / most(a, 2.0**-100))
        delta = tl.load(facts + h * 4 * C + col)[None] * number(kappa + noted * 2, active)[:, None]
        lost = a * (1 - exp_down(-least(delta, 80.0)))
        tl.store(to, total)
        tl.store(to + C, tl.sum(n, 0))
        tl.store(to + 2 * C, tl.sum(unseen * unseen, 0))
        tl.store(to + 3 * C, tl.sum(lost, 0))
    else:
        exact, total, longest_key, longest = add_originals(window_acc, window_sums, h * W, W, W_UP, D, C, HIGHEST)
        centre = tl.load(value_centre + (at * H + h) * D + tl.arange(0, D))[:, None]
        moved = tl.where((total > 0)[None], exact / total[None] - centre, 0.0)
        tl.store(to, total)
        tl.store(to + C, tl.sqrt(longest) + tl.load(largest_of_head + (at * 6 + 5) * H + h))
        tl.store(to + 2 * C, tl.sum(moved * moved, 0))
        tl.store(to + 3 * C, tl.sum(moved * centre, 0))
        tl.store(to + 4 * C, tl.full((C,), 1.0, tl.float32) * tl.sum(tl.sum(centre * centre, 1), 0))


@triton.jit
def _of_chunks(weighed, field, head, CHUNKS: tl.constexpr, CHUNKS_UP: tl.constexpr, C: tl.constexpr, here):
    """A sum over a head's chunks of tiles, [heads, C]."""
    chunk = tl.arange(0, CHUNKS_UP)[None, :, None]
    of = weighed + ((head[:, None, None] * (CHUNKS + 1) + chunk) * FIELDS + field) * C + tl.arange(0, C)[None, None]
    return tl.sum(tl.load(of, mask=here[:, None, None] & (chunk < CHUNKS), other=0.0), 1)


@triton.jit
def _squares_of_chunks(weighed, total, head, CHUNKS: tl.constexpr, CHUNKS_UP: tl.constexpr, C: tl.constexpr, here):
    """Field 2 of a head's chunks, each by the square of its chunk's share of `total`: [heads, C]."""
    chunk = tl.arange(0, CHUNKS_UP)[None, :, None]
    of = weighed + (head[:, None, None] * (CHUNKS + 1) + chunk) * FIELDS * C + tl.arange(0, C)[None, None]
    mask = here[:, None, None] & (chunk < CHUNKS)
    share = tl.load(of, mask=mask, other=0.0) / total[:, None]
    return tl.sum(tl.load(of + 2 * C, mask=mask, other=0.0) * (share * share), 1)


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
    costs, left,  # outputs
    H: tl.constexpr, HEADS: tl.constexpr, HEADS_UP: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_UP: tl.constexpr,
    NT: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, T: tl.constexpr, RELATIVE_TO: tl.constexpr,
    TOLERANCE: tl.constexpr, MARGIN: tl.constexpr, POOLED: tl.constexpr, COARSE_FEE: tl.constexpr,
    HOST_FEE: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    h, chunk, at = tl.program_id(0), tl.program_id(1), tl.load(layer)
    col, t = tl.arange(0, C), chunk * T + tl.arange(0, T)
    row = tl.arange(0, HEADS_UP)
    head, here, mine = h // HEADS * HEADS + row, row < HEADS, row == h % HEADS
    exact = _of_windows(weighed, 0, head, CHUNKS, C, here)
    total = _of_chunks(weighed, 0, head, CHUNKS, CHUNKS_UP, C, here) + exact
    unseen = _squares_of_chunks(weighed, total, head, CHUNKS, CHUNKS_UP, C, here)
    moved = _of_windows(weighed, 2, head, CHUNKS, C, here)
    along, centre = _of_windows(weighed, 3, head, CHUNKS, C, here), _of_windows(weighed, 4, head, CHUNKS, C, here)
    share = exact / total
    from_centre = moved * (share * share) + unseen
    squares = tl.where(here[:, None], from_centre + 2 * along * share + centre, 0.0)
    tolerance = MARGIN * TOLERANCE * tl.load(aim + at * (H // HEADS) + h // HEADS)
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
    nus = _of_chunks(weighed, 1, head, CHUNKS, CHUNKS_UP, C, here)
    nu_mean = _own((nus + exact * _of_windows(weighed, 1, head, CHUNKS, C, here)) / total, mine)
    l_minus = 1 - _own(_of_chunks(weighed, 3, head, CHUNKS, CHUNKS_UP, C, here) / total, mine)
    total = _own(total, mine)
    kept = (col < GROUP)[None]

    first, end = tl.load(meta + h * 3), tl.load(meta + h * 3 + 1)
    active = (t >= first) & (t < end)
    noted = (at * H + h) * NT + t
    nu_peak = number(nu + noted, active)
    a, n, norm, scaled = tile_sums(stats, h * NT + t, nu_peak, active, C)
    q_norm = tl.load(facts + h * 4 * C + col)
    keyed, keyed_n = keyed_sums(stats, h * NT + t, nu_peak, active, C)
    k0, k1, _, _ = key_terms(
        a, n, norm, keyed, keyed_n, q_norm, number(kappa + noted * 2, active), number(sigma_k + noted * 2, active),
        number(rho_k + noted * 2, active), nu_peak,
    )  # fmt: skip
    coarse_keys = (k0 + k1 * h_bar[None]) / l_minus[None]
    k0, k1, _, _ = key_terms(
        a, n, norm, keyed, keyed_n, q_norm, number(kappa + noted * 2 + 1, active),
        number(sigma_k + noted * 2 + 1, active), number(rho_k + noted * 2 + 1, active), nu_peak,
    )  # fmt: skip
    fine_keys = (k0 + k1 * h_bar[None]) / l_minus[None]
    skipped = least(n, number(sigma_v + noted * 3, active)[:, None] * norm)
    coarse = number(sigma_v + noted * 3 + 1, active)[:, None] * norm
    of_eta, of_rho = number(eta + noted * 2, active)[:, None], number(rho_v + noted * 2, active)[:, None]
    coarse = least(linear_value_terms(a, scaled, of_eta, of_rho), coarse)
    fine = number(sigma_v + noted * 3 + 2, active)[:, None] * norm
    of_eta, of_rho = number(eta + noted * 2 + 1, active)[:, None], number(rho_v + noted * 2 + 1, active)[:, None]
    fine = least(linear_value_terms(a, scaled, of_eta, of_rho), fine)
    of_total, of_room = (1 / total)[None], (1 / room)[None]
    shown = kept & active[:, None]
    o0 = tl.where(shown, least(no_nan((coarse_keys + skipped) * of_total * of_room), LARGEST), 0.0)
    o1 = tl.where(shown, least(no_nan((coarse_keys + coarse) * of_total * of_room), LARGEST), 0.0)
    o2 = tl.where(shown, least(no_nan((fine_keys + fine) * of_total * of_room), LARGEST), 0.0)
    if POOLED:
        c0 = tl.sqrt(tl.sum(o0 * o0, 1) * (1 / GROUP))
        c1 = tl.sqrt(tl.sum(o1 * o1, 1) * (1 / GROUP))
        c2 = tl.sqrt(tl.sum(o2 * o2, 1) * (1 / GROUP))
    else:
        c0, c1, c2 = tl.max(o0, 1), tl.max(o1, 1), tl.max(o2, 1)
    to = costs + h * 3 * NT + t
    tl.store(to, c0, mask=t < NT)
    tl.store(to + NT, c1, mask=t < NT)
    tl.store(to + 2 * NT, c2, mask=t < NT)

    j = tl.arange(0, PRICES)
    price = tl.exp2(-j.to(tl.float32) / STEPS)[:, None]
    level = _levels(c0[None], c1[None], c2[None], price, COARSE_FEE, HOST_FEE)  # [J, T]
    # Sums over tiles by the matrix unit; estimates may be off by the 2^-9 of its operands.
    remains = product((level == 0).to(tl.float32), rounded(o0)) + product((level == 1).to(tl.float32), rounded(o1))
    remains += product((level == 2).to(tl.float32), rounded(o2))
    if chunk == 0:
        rounding = 1.25 * expm1_up(tl.load(facts + h * 4 * C + C + col)) * (nu_mean + h_bar) + SUMMED * nu_mean
        remains += tl.where(col < GROUP, no_nan(rounding / room), 0.0)[None]
    to = left + ((h * CHUNKS + chunk) * PRICES + j[:, None]) * (C // 2) + col[None]
    tl.store(to, remains, mask=(col < C // 2)[None])


@triton.jit
def _levels(skip, coarse, fine, price, COARSE_FEE: tl.constexpr, HOST_FEE: tl.constexpr):
    """0 skip, 1 coarse, 2 finest, 3 promote: whichever is the least, its fee included."""
    coarse = coarse + COARSE_FEE * price
    fine = fine + price
    lowest = tl.minimum(tl.minimum(skip, coarse), fine)
    level = tl.where(skip <= lowest, 0, tl.where(coarse <= lowest, 1, 2))
    return tl.where(lowest > price * HOST_FEE, 3, level)


@triton.jit
def _settle(
    costs, left, meta,  # inputs
    levels, counts,  # outputs
    HEADS: tl.constexpr, HEADS_UP: tl.constexpr, NT: tl.constexpr, FLAGS: tl.constexpr, N_CHUNKS: tl.constexpr,
    GROUP: tl.constexpr, C: tl.constexpr, T: tl.constexpr, POOLED: tl.constexpr, COARSE_FEE: tl.constexpr,
    HOST_FEE: tl.constexpr, MAX_PROMOTED: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0)
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
    n_promoted = tl.zeros((T,), tl.int32)
    for start in range(0, NT, T):
        t = start + tile
        active = (t >= first) & (t < end)
        cost = costs + h * 3 * NT + t
        level = _levels(
            tl.load(cost, mask=active, other=0.0), tl.load(cost + NT, mask=active, other=0.0),
            tl.load(cost + 2 * NT, mask=active, other=0.0), price, COARSE_FEE, HOST_FEE,
        )  # fmt: skip
        n_promoted += ((level == 3) & active).to(tl.int32)
    n_active, some = tl.maximum(end - first, 0), tl.sum(n_promoted, 0)
    stays = tl.where((some <= MAX_PROMOTED * n_active.to(tl.float32)) & (dearer < PRICES), 1, 0)
    # Counted is what is stored: another evaluation may settle a tie differently.
    n_coarse, n_finest, n_promoted = tl.zeros((T,), tl.int32), tl.zeros((T,), tl.int32), tl.zeros((T,), tl.int32)
    for start in range(0, FLAGS, T):
        t = start + tile
        active = (t >= first) & (t < end) & (t < NT)
        cost = costs + h * 3 * NT + t
        level = _levels(
            tl.load(cost, mask=active, other=0.0), tl.load(cost + NT, mask=active, other=0.0),
            tl.load(cost + 2 * NT, mask=active, other=0.0), price, COARSE_FEE, HOST_FEE,
        )  # fmt: skip
        level = tl.where(active, level * stays, 0)
        tl.store(levels + h * FLAGS + t, level, mask=t < FLAGS)
        n_coarse += (level == 1).to(tl.int32)
        n_finest += (level == 2).to(tl.int32)
        n_promoted += (level == 3).to(tl.int32)
    to = counts + h * COUNTS
    tl.store(to, n_active)
    tl.store(to + 1, tl.sum(n_coarse, 0))
    tl.store(to + 2, tl.sum(n_finest, 0))
    tl.store(to + 3, tl.sum(n_promoted, 0))
    tl.store(to + 4, 1 - stays)


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
    scan: tuple[jax.Array, jax.Array, jax.Array],  # stats [H, NT, 4, C], acc [H, W, d, C], sums [H, W, 4, C]
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
    """Levels of tiles, `[H, flags]` int32, and `[H, COUNTS]` int32: tiles read from tier 1, of them at level 1, at the
    finest, promoted; whether the head goes dense at once."""
    stats, acc, sums = scan
    heads, n_tiles, _, columns = stats.shape
    chunks = -(-n_tiles // CHUNK)
    f32 = jnp.float32
    shape = dict(NT=n_tiles, C=columns)
    weighed = launch(
        _weigh, stats, acc, sums, notes["kappa"], notes["nu"], facts, largest, value_centre, meta, layer,
        out=jax.ShapeDtypeStruct((heads, chunks + 1, FIELDS.value, columns), f32), grid=(heads, chunks + 1), H=heads,
        W=acc.shape[1], W_UP=triton.next_power_of_2(acc.shape[1]), D=acc.shape[2], T=CHUNK, HIGHEST=terms.highest,
        **shape,
    )  # fmt: skip
    of_row = dict(HEADS=terms.heads, HEADS_UP=triton.next_power_of_2(terms.heads))
    fees = dict(POOLED=terms.pooled, COARSE_FEE=terms.coarse_fee, HOST_FEE=terms.host_fee, GROUP=terms.group)
    costs, left = launch(
        _offer, stats, *(notes[x] for x in NOTES), facts, weighed, aim, meta, layer,
        out=[
            jax.ShapeDtypeStruct((heads, 3, n_tiles), f32),
            jax.ShapeDtypeStruct((heads, chunks, PRICES.value, columns // 2), f32),
        ],
        grid=(heads, chunks), warps=8, H=heads, CHUNKS=chunks, CHUNKS_UP=triton.next_power_of_2(chunks), T=CHUNK,
        RELATIVE_TO=terms.relative_to, TOLERANCE=terms.tolerance, MARGIN=terms.margin,
        SUMMED=terms.summed, **of_row, **fees, **shape,
    )  # fmt: skip
    i32 = [jax.ShapeDtypeStruct((heads, n), jnp.int32) for n in (flags, COUNTS.value)]
    return launch(
        _settle, costs, left, meta, out=i32, grid=(heads,), warps=8, FLAGS=flags, N_CHUNKS=chunks,
        T=256, MAX_PROMOTED=terms.max_promoted, **of_row, **fees, **shape,
    )
