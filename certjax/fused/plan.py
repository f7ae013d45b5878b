"""Which tiles to read at their finest level or from the host, by what they would add to the bound."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from certjax.fused import reduce as rd
from certjax.fused.bound import Exact, TileSums, key_terms, no_nan, value_terms
from certjax.fused.operands import Layer, Queries
from certjax.policy import Policy

ORIGINAL, FINEST = 4.0, 2.3
"""Bytes of a key's and a value's channel, as originals and at their finest level with annotations."""

PRICES, STEPS = 72, 4
"""Candidates for the price of reading a tile in shares of a layer's tolerance: so many, so many to a factor of two."""


@struct.dataclass
class Plan:
    """Leaves `[H, NT]` bool but `give_up` [H]."""

    read: jax.Array  # tiles of tier 1 to read at their finest level
    promoted: jax.Array  # tiles to attend with their originals
    give_up: jax.Array  # KV heads that go dense at once


def tolerances(policy: Policy, batch: int, norm: jax.Array) -> jax.Array:
    """What each head is allowed, or what the root mean square over a layer is: `[H, G]`. `norm`: [H, G] of outputs."""
    if policy.relative_to == "absolute":
        return jnp.full(norm.shape, policy.tolerance)
    if policy.relative_to == "layer":
        square = jnp.square(norm).reshape(batch, -1).mean(-1)
        norm = jnp.broadcast_to(jnp.repeat(jnp.sqrt(square), norm.shape[0] // batch)[:, None], norm.shape)
    return jnp.where(jnp.isfinite(norm), policy.tolerance * norm, 0.0)


def choose(
    policy: Policy, batch: int, group: int, sums: TileSums, windows: Exact, queries: Queries, layer: Layer
) -> Plan:
    """Every tile at the level with the least error plus price, at the highest price at which what is left fits.

    Estimates decide what is read and nothing else: what was read is judged afterwards.
    """
    centre = layer.value_centre[:, None]
    # Values not seen yet are taken to point anywhere: their squares add up.
    tier1, mean, unseen = rd.sums(1, sums.a, sums.n, jnp.square(sums.norm * sums.n / jnp.maximum(sums.a, 2.0**-100)))
    total = tier1 + windows.total
    mean, unseen = mean / total, unseen / (total * total)
    moved = (windows.values.swapaxes(1, 2) - windows.total[..., None] * centre) / total[..., None]
    from_centre, norm = rd.sums(-1, moved**2, (moved + centre) ** 2)
    h = jnp.sqrt(from_centre + unseen)
    room = policy.margin * tolerances(policy, batch, jnp.sqrt(norm + unseen)[:, :group])  # [H, G]
    rounding = 1.1 * (jnp.expm1(queries.eps) * (mean + h))[:, :group] / room
    scale = (1 / (room * total[:, :group]))[:, None]

    def shares(read: bool):  # [H, NT, G]
        k0, k1 = key_terms(sums, queries, layer, int(read))
        terms = (k0 + k1 * h[:, None] + value_terms(sums, layer, read))[..., :group] * scale
        return jnp.where(layer.active[..., None], no_nan(terms), 0.0)

    def joint(x):  # [H, NT, G] -> [H, NT]; written out, so that it is no kernel of its own
        heads = [x[..., i] for i in range(group)]
        if policy.pooled:
            return jnp.sqrt(sum(y * y for y in heads) / group)
        return jnp.stack(heads).max(0)

    skipped, read = shares(False), shares(True)
    # Computed once, not once a price.
    skipped, read = lax.optimization_barrier((skipped, read))
    host = policy.host_price * ORIGINAL / FINEST  # the price of originals, in tiles read

    def levels(price):  # 0 skip, 1 read, 2 promote
        coarse, fine = joint(skipped), joint(read) + price
        level = jnp.where(coarse <= fine, 0, 1)
        return jnp.where(jnp.minimum(coarse, fine) > price * host, 2, level)

    prices = jnp.asarray(np.exp2(-np.arange(PRICES) / STEPS), jnp.float32)
    level = levels(prices[:, None, None])[..., None]  # [J, H, NT, 1]
    left = jnp.where(level == 0, skipped, jnp.where(level == 1, read, 0.0)).sum(2) + rounding  # [J, H, G]
    by_row = left.reshape(PRICES, batch, -1)
    worst = jnp.square(by_row).mean(-1) if policy.pooled else by_row.max(-1)  # [J, b]
    dearer = (~(worst <= 1)).sum(0)  # what is left falls with the price: the first that fits comes after these
    heads = layer.active.shape[0] // batch
    price = jnp.repeat(jnp.exp2(-dearer.astype(jnp.float32) / STEPS), heads)
    level = jnp.where(layer.active, levels(price[:, None]), 0)
    promoted = level == 2
    n_promoted, n_active = rd.sums(1, promoted, layer.active)
    give_up = (n_promoted > policy.max_promoted * n_active) | jnp.repeat(dearer == PRICES, heads)
    keep = ~give_up[:, None]
    return Plan((level == 1) & keep, promoted & keep, give_up)
