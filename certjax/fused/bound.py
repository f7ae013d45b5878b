"""The certificate of the fused path, from sums over tiles. Derivation: docs/kernels.md.

Of a tile the kernels return `A = sum w`, `N = sum w nu` and `Q = sum w^2`; with the tile's stored peaks and spectral
norms they bound what its keys and values add to the error. Sums over tiles are taken together, in one kernel, which is
why a tile's bound on its keys is written as a linear function of `h`: the distance of the output from the centre is
not known before all else is summed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from certjax.bounds.arithmetic import inflate
from certjax.bounds.spectral import second_order
from certjax.fused import reduce as rd
from certjax.fused.operands import (
    TENSOR_UNIT,
    TILE,
    VANISHED,
    Layer,
    Queries,
    eps_of_originals,
    turn_back,
    turning_back,
)
from pallas_kernels import numerics as num
from pallas_kernels.levels import COARSE, FINEST, PROMOTED, SKIP, VALUES

FLUSHED = TILE**0.5 * 2.0**-63
"""Norm of the weights of a tile whose squares may have been flushed to zero."""


HIGHEST = 100.0
"""Largest score of a window or a promoted tile, in units of log 2 and less the reference (docs/kernels.md)."""


@struct.dataclass
class TileSums:
    """Sums over the tokens of each tile, in units of `e^reference`. Leaves `[H, NT, G]`."""

    a: jax.Array  # sum w
    n: jax.Array  # sum w nu
    norm: jax.Array  # sqrt(sum w^2), which is no more than a
    scaled: jax.Array  # sum w s, s the scale of the value's codes
    keyed: jax.Array  # sum w s, s the scale of the key's codes
    keyed_n: jax.Array  # sum w s nu, the same


def tile_sums(stats: jax.Array, layer: Layer) -> TileSums:
    """`stats`: [H, NT, 4, C] as the kernels return them."""
    peak = layer.nu_peak[..., None] * ((1 + 2.0**-20) / 255)
    plain, keyed = jnp.split(stats, 2, axis=-1)
    a = plain[:, :, 0]
    return TileSums(
        a=a,
        n=plain[:, :, 1] * peak,
        norm=jnp.minimum(jnp.sqrt(plain[:, :, 2]) + FLUSHED, a),
        scaled=plain[:, :, 3],
        keyed=keyed[:, :, 0],
        keyed_n=keyed[:, :, 1] * peak,
    )


def by_level(level: jax.Array, *trees):
    """Trees with leaves `[H, NT, G]`, of each level from SKIP to FINEST, joined. `level`: [H, NT]; what is promoted has
    0."""

    def pick(*x):
        return jnp.select([level[..., None] == i for i in range(PROMOTED)], x, 0.0)

    return jax.tree.map(pick, *trees)


def delta_of(queries: Queries, kappa: jax.Array) -> jax.Array:
    """`||q|| kappa / sqrt(d)`: [H, NT] -> [H, NT, G]."""
    return queries.norm[:, None] * (kappa[..., None] * num.NORM_SLACK)


def key_terms(sums: TileSums, queries: Queries, layer: Layer, level: int) -> tuple[jax.Array, jax.Array]:
    """`(k0, k1)` with `k0 + k1 h` at least `L^- W` times what a tile adds to E_key, keys at `level`: [H, NT, G] each.

    Token by token, with the largest Delta or with Delta in units of the token's scale, or by the spectral norm,
    whichever is less for `h = 0`: each is a bound for every h.
    """
    delta = delta_of(queries, layer.kappa_peak[..., level])
    coefficient = delta_of(queries, layer.sigma_k[..., level]) * sums.norm
    first, second = num_expm1(delta), second_order(delta)
    k0, k1 = first * sums.n, first * sums.a
    together = coefficient * layer.nu_peak[..., None] + second * sums.n
    k1 = jnp.where(together < k0, coefficient + second * sums.a, k1)
    k0 = jnp.minimum(k0, together)
    step = delta_of(queries, layer.rho_k[..., level])  # Delta_t is at most so many of the token's scale
    growth = step * growth_up(delta)
    by_scale = jnp.where(step < num.LARGEST_STEP, growth * sums.keyed_n, jnp.inf)
    k1 = jnp.where(by_scale < k0, growth * sums.keyed, k1)
    return jnp.minimum(k0, by_scale), k1


def growth_up(delta: jax.Array) -> jax.Array:
    """`(e^x - 1) / x` from above, as `sinh(y) / y <= e^(y^2 / 6)`; finite beyond MAX_DELTA."""
    x = jnp.minimum(delta, num.MAX_DELTA)
    return jnp.exp(x * (0.5 + x / 24)) * (1 + 2.0**-18)


def num_expm1(delta: jax.Array) -> jax.Array:
    """`e^delta - 1` from above, finite beyond MAX_DELTA, where the bound is infinite anyway."""
    return jnp.expm1(jnp.minimum(delta, num.MAX_DELTA)) * (1 + 2.0**-18)


def value_terms(sums: TileSums, layer: Layer, level: int) -> jax.Array:
    """`W` times what a tile adds to E_val with its values as they are read at `level`: `[H, NT, G]`.

    Token by token with the largest residual or, as a token's residual is at most rho times its scale, with the scales;
    or by the spectral norm.
    """
    linear, planes = sums.n, {SKIP: 0, COARSE: 1, VALUES: 2, FINEST: 2}[level]
    if planes:
        rho = layer.rho_v[..., planes - 1, None]
        by_scale = jnp.where(rho < num.LARGEST_RHO, sums.scaled * rho, jnp.inf)
        linear = jnp.minimum(sums.a * layer.eta_peak[..., planes - 1, None], by_scale)
    return jnp.minimum(linear, layer.sigma_v[..., planes, None] * sums.norm)


@struct.dataclass
class Exact:
    """What was attended to with original keys and values."""

    values: jax.Array  # [H, d, G] sum w v
    total: jax.Array  # [H, G] sum w
    key: jax.Array  # [H, G] norm of the longest, rounded up
    value: jax.Array  # [H, G]


def exact_of(acc: jax.Array, sums: jax.Array, *, alone: bool = False) -> Exact:
    """Joins parts: `acc` [H, S, d, G], `sums` [H, S, 4, G].

    In units of `e^reference`, or, where nothing else is to be added (`alone`), of the largest weight: scores may then
    be anything.
    """
    peak = sums[:, :, 3]
    if alone:
        scale = jnp.exp2(peak - peak.max(1, keepdims=True))
    else:  # a total whose reciprocal vanishes must not pass for one: not a number, which fails as such
        scale = jnp.where(peak <= HIGHEST, jnp.exp2(peak), jnp.inf)
        # A part that read nothing says so by a total of 0.
        acc = jnp.where((sums[:, :, 0] != 0)[:, :, None], acc, 0.0)
    total, longest_key, longest_value = rd.together(
        1, (sums[:, :, 0] * scale, rd.SUM), (sums[:, :, 1], rd.MAX), (sums[:, :, 2], rd.MAX)
    )
    longest = [jnp.sqrt(x) * num.NORM_SLACK + acc.shape[2] ** 0.5 * VANISHED for x in (longest_key, longest_value)]
    return Exact((acc * scale[:, :, None]).sum(1), total, *longest)


def joined(a: Exact, b: Exact) -> Exact:
    """Two disjoint parts."""
    return Exact(a.values + b.values, a.total + b.total, jnp.maximum(a.key, b.key), jnp.maximum(a.value, b.value))


@struct.dataclass
class Pass:
    """What a pass over the cache found: sums of the weights used, and the values they were used for."""

    coarse: TileSums  # of keys as the scan saw them
    fine: TileSums  # of tiles at the finest level, and of what is not promoted of those that are
    level: jax.Array  # [H, NT] int32, `levels.level_of_rest`
    values: jax.Array  # [H, d, G] what the second pass returns, added up
    exact: Exact  # windows and promoted pieces


@struct.dataclass
class Judged:
    """An output with its bound. Leaves `[H, G]` but `out` [H, G, d]."""

    out: jax.Array
    norm: jax.Array  # ||out||, rounded up
    e_key: jax.Array
    e_val: jax.Array
    e_arith: jax.Array
    e_total: jax.Array
    e_key_paper: jax.Array
    e_val_paper: jax.Array
    delta_max: jax.Array
    tail_mass: jax.Array
    total: jax.Array  # W
    l_minus: jax.Array
    from_centre: jax.Array  # of the output, rounded up
    nu_mean: jax.Array


def judge(found: Pass, queries: Queries, layer: Layer, reads: jax.Array, additions: int) -> Judged:
    """Output and certificate of a pass. `reads`: [H, 1], pieces that a program reads at most; `additions`: float32
    roundings that a tile's sum of values goes through at most."""
    exact, level, coarse, fine = found.exact, found.level, found.coarse, found.fine
    d, n_tiles = found.values.shape[1], level.shape[1]
    sums = by_level(level, *[coarse] * FINEST, fine)
    keys = by_level(level, *[key_terms(coarse, queries, layer, 0)] * FINEST, key_terms(fine, queries, layer, 1))
    values = by_level(level, *(value_terms(fine if i == FINEST else coarse, layer, i) for i in range(PROMOTED)))
    finest, coarsely = level == FINEST, level == COARSE
    finely = finest | (level == VALUES)
    kappa = jnp.where(finest, layer.kappa_peak[..., 1], layer.kappa_peak[..., 0])
    kappa = jnp.where(level == PROMOTED, 0.0, kappa)
    delta = delta_of(queries, kappa)
    grown = num_expm1(delta)
    eta = jnp.where(finely, layer.eta_peak[..., 1], layer.eta_peak[..., 0])[..., None]
    read = (coarsely | finely)[..., None]
    # A value is `s (4 high + 2)`, or `s (4 high + low + 2.5)`.
    offset = jnp.where(coarsely, 2.0, jnp.where(finely, 2.5, 0.0))[..., None] * sums.scaled
    tier1, n, val, shrunk, k0, k1, g0, g1, n_read, eta_read, paper, offset = rd.sums(
        1,
        sums.a,
        sums.n,
        values,
        sums.a * jnp.exp(-delta),
        *keys,
        grown * sums.n,
        grown * sums.a,
        jnp.where(read, sums.n, 0.0),
        jnp.where(read, sums.a * eta, 0.0),
        sums.a * jnp.where(read, eta, layer.nu_peak[..., None]),
        offset,
    )
    total = tier1 + exact.total  # W
    centre = layer.value_centre[:, None]
    acc = turn_back((found.values + offset[:, None]).swapaxes(1, 2))
    acc = acc + tier1[..., None] * centre + exact.values.swapaxes(1, 2)
    out = acc / total[..., None]
    from_centre, norm = (
        jnp.sqrt(x) * num.NORM_SLACK + d**0.5 * VANISHED for x in rd.sums(-1, (centre - out) ** 2, out**2)
    )
    share = exact.total / total
    exact_nu = exact.value + layer.value_centre_norm[:, None]
    nu_mean = n / total + share * exact_nu
    read_mean = (n_read + eta_read) / total
    e_val = val / total
    # What was summed, by magnitude: |y| <= nu + eta where values were read, |c| for all of tier 1, |v| where exact.
    # Codes are summed as two planes and an offset, larger than what they stand for by up to 9 sqrt(d) cells of 31.
    depth = TILE + n_tiles + 64
    split = summed(additions + depth)
    accumulated = ((1 + 0.3 * d**0.5) * split + 2 * turning_back(d)) * read_mean + split * share * exact.value
    accumulated += (3 * num.gamma(depth) + 8 * num.U) * (nu_mean + layer.value_centre_norm[:, None] + read_mean)
    accumulated += 2 * num.U * reads * share * exact.value  # each piece is added to what was read before it, rescaled
    from_centre = from_centre + 2 * accumulated
    h = from_centre + e_val
    l_minus = shrunk / total + share
    delta_max = queries.norm * (kappa.max(1) * num.NORM_SLACK)[:, None]
    e_key = (k0 + k1 * h) / (total * l_minus)
    linear = (g0 + g1 * h) / (total * l_minus)
    eps = jnp.maximum(queries.eps, eps_of_originals(queries, exact.key, reads, queries.reference))
    grow = jnp.exp(eps)
    widened = (grow * grow - 1) * linear + grow * jnp.expm1(eps) * (nu_mean + h) / l_minus
    nu_max = jnp.maximum(layer.nu_max[:, None], exact_nu)
    n_tokens = (n_tiles + 64) * TILE
    # 32: of a product of a weight and a key's scale 2^-126 may vanish, and counts LARGEST_STEP times that.
    flushed = 32 * n_tokens * num.UNDERFLOW / total * jnp.exp(delta_max) * grow * grow / l_minus
    flushed *= nu_max + layer.eta_max[:, None] + h
    # Weights times a value's scale, and their lower halves, may vanish too: 2^-125 each, times a code or rho.
    flushed += n_tokens * (2.0**-117 * d**0.5) / total
    valid = (2 * eps < num.MAX_DELTA) & (delta_max < num.MAX_DELTA)
    e_key = jnp.where(delta_max < num.MAX_DELTA, e_key, jnp.inf)
    e_arith = jnp.where(valid, widened + flushed + accumulated, jnp.inf)
    bound = jnp.minimum(no_nan(e_key + e_val + e_arith), no_nan(nu_max + from_centre))
    two_d = jnp.minimum(2 * delta_max, 80.0)
    mass = tier1 / total
    return Judged(
        out=out,
        norm=norm,
        e_key=e_key,
        e_val=e_val,
        e_arith=e_arith,
        e_total=bound * inflate(2 * depth) + num.ABSOLUTE_FLOOR,
        e_key_paper=2 * nu_max * jnp.exp(two_d) * mass * jnp.expm1(two_d),
        e_val_paper=paper / total,
        delta_max=delta_max,
        tail_mass=mass,
        total=total,
        l_minus=l_minus,
        from_centre=from_centre,
        nu_mean=nu_mean,
    )


def summed(additions: int) -> float:
    """Relative error of a sum of values over tiles: weights in two halves, accumulations of the matrix unit over a
    tile, and float32 roundings."""
    return 2.0**-17 + TILE // num.PRODUCTS * TENSOR_UNIT + num.gamma(additions)


def summing(d: int, additions: int, depth: int) -> float:
    """About what the sums of values and weights add to a bound, in shares of the mean of nu: for the plan."""
    return (1 + 0.3 * d**0.5) * summed(additions + depth) + 4 * num.gamma(depth)


def judge_dense(
    found: Exact, queries: Queries, n: int, tiles: int, additions: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Output of a pass over all originals, its norm and its error: `[H, G, d]`, `[H, G]`, `[H, G]`."""
    total, longest_value = found.total, found.value
    out = found.values.swapaxes(1, 2) / total[..., None]
    eps = eps_of_originals(queries, found.key, tiles, 0.0)
    accumulated = (summed(additions) + 3 * num.gamma(TILE + n // TILE + 64)) * longest_value
    norm = jnp.sqrt((out * out).sum(-1)) * num.NORM_SLACK + out.shape[-1] ** 0.5 * VANISHED
    radius = longest_value + norm + accumulated
    grow = jnp.exp(eps)
    error = (grow * jnp.expm1(eps) + n * num.UNDERFLOW / total * grow * grow) * radius + accumulated
    error = jnp.minimum(jnp.where(eps < num.MAX_DELTA, no_nan(error), jnp.inf), no_nan(longest_value + norm))
    return out, norm, error * (1 + 2.0**-12) + num.ABSOLUTE_FLOOR


def no_nan(x: jax.Array) -> jax.Array:
    """Infinity for what is not a number."""
    return jnp.where(jnp.isnan(x), jnp.inf, x)
