"""Which tiles to read at their finest level or from the host, by what they would add to the bound."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from certjax.fused import reduce as rd
from certjax.fused.bound import Exact, TileSums, delta_of, key_terms, no_nan, value_terms
from certjax.fused.operands import Layer, Queries
from certjax.policy import Policy
from pallas_kernels import levels as lv
from pallas_kernels.levels import COARSE, FINEST, PROMOTED, SKIP
from pallas_kernels.query import folded

FINEST_BYTES, COARSE_BYTES, ORIGINAL_BYTES = 2.3, 0.64, 4.0
"""Of a key's and a value's channel, with scales and weights, that the second pass reads."""

PRICES, STEPS = 72, 4
"""Candidates for the price of reading a tile in shares of a layer's tolerance: so many, so many to a factor of two."""


@struct.dataclass
class Plan:
    """What to read."""

    words: jax.Array  # [H, NT] int32, see `pallas_kernels.levels`
    give_up: jax.Array  # [H] bool, KV heads that go dense at once


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
    windows: Exact,
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
    centre = layer.value_centre[:, None]
    lost = sums.a * -jnp.expm1(-delta_of(queries, layer.kappa_peak[..., 0]))
    tier1, mean, lost = rd.sums(1, sums.a, sums.n, lost)
    total = tier1 + windows.total
    l_minus, mean = 1 - lost / total, mean / total
    # Values not seen yet are taken to point anywhere: their squares add up. All that is squared is a share of the
    # total first: weights may be so small that their squares vanish.
    unseen = sums.norm / total[:, None] * (sums.n / jnp.maximum(sums.a, 2.0**-100))
    (unseen,) = rd.sums(1, jnp.square(unseen))
    moved = (windows.values.swapaxes(1, 2) - windows.total[..., None] * centre) / total[..., None]
    from_centre, norm = rd.sums(-1, moved**2, (moved + centre) ** 2)
    room = policy.margin * layer.aim * tolerances(policy, batch, jnp.sqrt(norm + unseen)[:, :group])  # [H, G]
    h = jnp.sqrt(from_centre + unseen).at[:, :group].add(2 * room)  # what the values may add to it
    nu_mean = mean + windows.total / total * (windows.value + layer.value_centre_norm[:, None])
    rounding = (1.25 * jnp.expm1(queries.eps) * (nu_mean + h) + summed * nu_mean)[:, :group] / room
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
    offers = lax.optimization_barrier(jnp.stack([shares(level) for level in (SKIP, COARSE, FINEST)]))
    heaviest = jnp.square(sums.norm / jnp.maximum(sums.a, 2.0**-120))[..., :group]
    left_over = offers[FINEST] * (1 - heaviest)
    n_pieces = lv.pieces_of_a_tile(layer.keys.shape[-1])
    host = policy.host_price * ORIGINAL_BYTES / FINEST_BYTES
    fees = (0.0, COARSE_BYTES / FINEST_BYTES, 1.0, 1.0 + host / n_pieces, host)  # in tiles read at their finest
    costs = [*joint(offers), joint(left_over), 0.0]  # [H, NT] each

    def settled(price):
        """The level, WHOLE for all pieces of a tile."""
        at = [x + fee * price for x, fee in zip(costs, fees, strict=True)]
        least = jnp.minimum(jnp.minimum(at[SKIP], at[COARSE]), at[FINEST])
        level = jnp.where(at[SKIP] <= least, SKIP, jnp.where(at[COARSE] <= least, COARSE, FINEST))
        level = jnp.where(at[PROMOTED] < least, PROMOTED, level)
        return jnp.where(at[WHOLE] < jnp.minimum(least, at[PROMOTED]), WHOLE, level)

    prices = jnp.asarray(np.exp2(-np.arange(PRICES) / STEPS), jnp.float32)
    level = settled(prices[:, None, None])[..., None]  # [J, H, NT, 1]
    left = sum(jnp.where(level == i, x, 0.0) for i, x in enumerate([*offers, left_over])).sum(2) + rounding  # [J, H, G]
    by_row = left.reshape(PRICES, batch, -1)
    worst = jnp.square(by_row).mean(-1) if policy.pooled else by_row.max(-1)  # [J, b]
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
    return Plan(lax.optimization_barrier(jnp.where(give_up[:, None], SKIP, words)), give_up)


WHOLE = PROMOTED + 1
"""All pieces of a tile, while levels are chosen."""
