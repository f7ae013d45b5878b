"""Which tiles to read, and how finely, by what they would add to the bound.

A plan is made of what a pass over the cache has found, for a pass after it: the next step's, as queries that follow
each other attend to much the same, or, where the bound of this one does not keep the tolerance, a second pass of this
step. It says what is read and nothing else: no bound rests on it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from certjax.fused import reduce as rd
from certjax.fused.bound import Judged, TileSums, key_terms, no_nan, value_terms
from certjax.fused.operands import Layer, Queries
from certjax.policy import Policy
from pallas_kernels import levels as lv
from pallas_kernels.levels import COARSE, FINEST, PROMOTED, SKIP, VALUES
from pallas_kernels.query import folded

PRICES, STEPS = 62, 4
"""Candidates for the price of reading a tile in shares of a layer's tolerance: so many, so many to a factor of two."""


HEADROOM = 0.9
"""Of the tolerance: what a plan aims at, so that it serves the queries that follow, too."""

LEAST = 0.25
"""An estimate is taken to be too large by no more than this says."""

REFRESH = 16
"""Steps after which a layer's plan is made anew, whether or not its bounds held: what is read in vain is dropped."""


def host_fee(policy: Policy) -> float:
    """Of a tile whose pieces are all read from the host, as `levels.FEES`."""
    return policy.host_price * lv.ORIGINAL_BYTES / lv.FINEST_BYTES


@struct.dataclass
class Plan:
    """What to read."""

    words: jax.Array  # [H, NT] int32, see `pallas_kernels.levels`
    give_up: jax.Array  # [H] bool, KV heads that go dense at once
    counts: jax.Array  # [H, COUNTS] int32
    summary: jax.Array  # [H, .] int32


def due(length: jax.Array, layer: jax.Array) -> jax.Array:
    """Sequences whose plan is made anew at this step, each layer at another one. `length`: [b] int32; `layer`: []."""
    return (length + layer) % REFRESH == 0


def held(words: jax.Array, fresh: Plan, anew: jax.Array, active: jax.Array) -> jax.Array:
    """What the cache keeps for the next step, `[H, NT]` uint16: the `words` of this one, or those of a `fresh` plan for
    the heads `anew` `[H]`. What is not `active` `[H, NT]` yet, and all of a head that was given up, is to be read at
    its coarsest."""
    kept = jnp.where(anew[:, None], fresh.words, words)
    known = active & ~(anew & fresh.give_up)[:, None]
    return jnp.where(known, kept, COARSE).astype(jnp.uint16)


def tolerances(policy: Policy, batch: int, norm: jax.Array) -> jax.Array:
    """What each head is allowed, or what the root mean square over a layer is: `[H, G]`. `norm`: [H, G] of outputs."""
    if policy.relative_to == "absolute":
        return jnp.full(norm.shape, policy.tolerance)
    if policy.relative_to == "layer":
        square = jnp.square(norm).reshape(batch, -1).mean(-1)
        norm = jnp.broadcast_to(jnp.repeat(jnp.sqrt(square), norm.shape[0] // batch)[:, None], norm.shape)
    return jnp.where(jnp.isfinite(norm), policy.tolerance * norm, 0.0)


def choose(
    policy: Policy,
    batch: int,
    group: int,
    sums: TileSums,
    weights: jax.Array,  # [H, NT, C, 128] of the scan
    judged: Judged,  # what came of the plan before
    queries: Queries,
    layer: Layer,
    summed: float,
) -> Plan:
    """Every tile at the level with the least error plus price, at the highest price at which what is left fits.

    What a piece of a tile would add is taken to be its share of the tile's weights; a tile whose heaviest token has a
    share of `Q / A^2` at least can be rid of so much of its error for the price of one piece.

    Estimates decide what is read and nothing else: what was read is judged afterwards. `summed`: what the sums of
    values and weights may add, by `bound.summing`.
    """
    total, l_minus = judged.total, judged.l_minus
    room = HEADROOM * policy.margin * tolerances(policy, batch, judged.norm[:, :group])  # [H, G]
    h = judged.from_centre.at[:, :group].add(2 * room)  # what the values may add to it
    rounding = (1.25 * jnp.expm1(queries.eps) * (judged.nu_mean + h) + summed * judged.nu_mean)[:, :group] / room
    scale = (1 / total[:, :group])[:, None], (1 / room)[:, None]

    def shares(level: int):  # [H, NT, G]
        k0, k1 = key_terms(sums, queries, layer, int(level == FINEST))
        terms = (k0 + k1 * h[:, None]) / l_minus[:, None] + value_terms(sums, layer, level)
        terms = terms[..., :group] * scale[0] * scale[1]
        return jnp.where(layer.active[..., None], no_nan(terms), 0.0)

    def joint(x):  # [..., G] -> [...]; written out, so that it is no kernel of its own
        heads = [x[..., i] for i in range(group)]
        if policy.pooled:
            return jnp.sqrt(sum(y * y for y in heads) / group)
        return jnp.stack(heads).max(0)

    # Computed once, not once a price.
    offers = lax.optimization_barrier(jnp.stack([shares(level) for level in range(PROMOTED)]))
    heaviest = jnp.square(sums.norm / jnp.maximum(sums.a, 2.0**-120))[..., :group]
    left_over = offers[FINEST] * (1 - heaviest)
    n_pieces = lv.pieces_of_a_tile(layer.keys.shape[-1])
    host = host_fee(policy)
    fees = (*lv.FEES, 1.0 + host / n_pieces, host)
    costs = [*joint(offers), joint(left_over), 0.0]  # [H, NT] each

    def settled(price):
        """The level, WHOLE for all pieces of a tile."""
        at = [x + fee * price for x, fee in zip(costs, fees, strict=True)]
        least = functools.reduce(jnp.minimum, at[:PROMOTED])
        level = jnp.select([x <= least for x in at[:FINEST]], [SKIP, COARSE, VALUES], FINEST)
        level = jnp.where(at[PROMOTED] < least, PROMOTED, level)
        return jnp.where(at[WHOLE] < jnp.minimum(least, at[PROMOTED]), WHOLE, level)

    prices = jnp.asarray(np.exp2(-np.arange(PRICES) / STEPS), jnp.float32)

    def over_row(x):  # [..., H, G] -> [..., b]
        x = x.reshape(*x.shape[:-2], batch, -1)
        return jnp.square(x).mean(-1) if policy.pooled else x.max(-1)

    def estimate(level):  # [..., H, NT] -> [..., b], of the bound
        left = (jnp.where(level[..., None] == i, x, 0.0) for i, x in enumerate([*offers, left_over]))
        return over_row(sum(left).sum(-2) + rounding)

    # How much of what is estimated the bound comes to, by the plan before.
    words = layer.words[:, : sums.a.shape[1]]
    now = jnp.where(lv.level_of_rest(words, layer.keys.shape[-1]) == PROMOTED, WHOLE, lv.level_of(words))
    of_estimate = over_row(judged.e_total[:, :group] / room) / estimate(now)
    of_estimate = jnp.where(jnp.isfinite(of_estimate), jnp.clip(of_estimate, LEAST, 1.0), 1.0)
    worst = estimate(settled(prices[:, None, None])) * of_estimate  # [J, b]
    dearer = (~(worst <= 1)).sum(0)  # what is left falls with the price: the first that fits comes after these
    heads = layer.active.shape[0] // batch
    price = jnp.repeat(jnp.exp2(-dearer.astype(jnp.float32) / STEPS), heads)[:, None]
    level = jnp.where(layer.active, settled(price), SKIP)
    n_promoted, n_active = rd.sums(1, level >= PROMOTED, layer.active)
    give_up = (n_promoted > policy.max_promoted * n_active) | jnp.repeat(dearer == PRICES, heads)

    of_piece = folded(weights.astype(jnp.float32).swapaxes(2, 3))[..., :group]
    of_piece = of_piece.reshape(*level.shape, n_pieces, -1, group).sum(3)
    share = of_piece / jnp.maximum(of_piece.sum(2, keepdims=True), 2.0**-120)
    worth = joint(offers[FINEST][:, :, None] * share)  # [H, NT, pieces]
    # The dearest, until the others come to no more than was said to be left.
    piece = jnp.arange(n_pieces)
    behind = (worth[..., None, :] < worth[..., None]) | (
        (worth[..., None, :] == worth[..., None]) & (piece >= piece[:, None])
    )
    rest = jnp.where(behind, worth[..., None, :], 0.0).sum(-1)
    dear = ~(rest <= costs[PROMOTED][..., None]) | (level == WHOLE)[..., None]
    pieces = (dear << piece).sum(2)
    words = jnp.where(level >= PROMOTED, lv.word(PROMOTED, pieces), level)
    # A barrier: what is counted and what is read are one evaluation.
    words = lax.optimization_barrier(jnp.where(give_up[:, None], SKIP, words))
    d = layer.keys.shape[-1]
    return Plan(words, give_up, lv.counts_of(words, layer.active, give_up), lv.summary_of(words, d))


WHOLE = PROMOTED + 1
"""All pieces of a tile, while levels are chosen."""
