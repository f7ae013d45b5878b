"""Which blocks to read at which precision: the selection policies.

All see one tier-1 pass and return a `Plan`; none touches the cache. A head whose plan would cost more than dense
attention gives up at once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from certjax.costs import ReadCosts, bytes_of
from certjax.policy import Policy

BISECTIONS = 20
"""Steps of the search for the logarithm of the price of a byte, over -60 ... 60."""


@struct.dataclass
class Plan:
    """What to read, and from where. Leaves `[b, Hkv, G, NB]` bool and `[b, Hkv, G]` bool unless noted."""

    key_level: jax.Array  # [b, Hkv, NB] int32, precision of tier-1 keys
    value_level: jax.Array  # [b, Hkv, NB] int32, 0 the centre alone
    keys: jax.Array  # blocks to attend with original keys (set F)
    values: jax.Array  # blocks to attend with original values (set W)
    raised: jax.Array  # rung 1: key blocks promoted beyond the base set
    give_up: jax.Array  # dense at once


def tier1_plan(mass: jax.Array, key_level: int, value_level: int) -> Plan:
    """Tier 1 at one precision throughout, nothing promoted. `mass`: [b, Hkv, G, NB], for its shape."""
    b, n_heads, group, n_blocks = mass.shape
    none = jnp.zeros(mass.shape, bool)
    return Plan(
        key_level=jnp.full((b, n_heads, n_blocks), key_level, jnp.int32),
        value_level=jnp.full((b, n_heads, n_blocks), value_level, jnp.int32),
        keys=none,
        values=none,
        raised=none[..., 0],
        give_up=none[..., 0],
    )


def paper_plan(
    policy: Policy, tier1: Plan, mass: jax.Array, eta_max: jax.Array, active: jax.Array
) -> Plan:
    """Promote keys by descending mass up to a coverage, values by `p_b eta_b > v_tol`.

    Parameters
    ----------
    tier1
        The plan with nothing promoted.
    mass : `[b, Hkv, G, NB]`
        `p_b` by tier-1 scores, 0 for blocks that are not in tier 1.
    eta_max : `[b, Hkv, 1, NB]`
        Largest `eta_t` of each block.
    active : `[b, 1, 1, NB]` bool
        Blocks read from tier 1.
    """
    rank, ordered = _descending(jnp.where(active, mass, -1.0))
    n_active = jnp.broadcast_to(active.sum(-1), rank.shape[:-1])
    # Mass in the windows is attended exactly: it counts as covered.
    total = mass.sum(-1, keepdims=True)
    covered = (1.0 - total) + jnp.cumsum(jnp.maximum(ordered, 0.0), -1)
    base = jnp.sum(covered < policy.tau_cov, -1) + 1
    base = jnp.clip(base, policy.k_min, policy.k_max)
    base = jnp.minimum(base, n_active)
    tail = jnp.where(rank >= base[..., None], jnp.maximum(mass, 0.0), 0.0).sum(-1)
    raised = (tail > policy.rung1_threshold) & (base < n_active)
    k = jnp.where(raised, jnp.ceil(base * policy.rung1_multiplier).astype(base.dtype), base)
    return tier1.replace(
        keys=(rank < k[..., None]) & active, values=(mass * eta_max > policy.v_tol) & active, raised=raised
    )


def budget_plan(
    policy: Policy,
    costs: ReadCosts,
    key_terms: list[jax.Array],
    value_terms: list[jax.Array],
    room: jax.Array,
    e_arith: jax.Array,
    active: jax.Array,
) -> Plan:
    """Read as few bytes as make the estimated bound fit.

    Every block takes the precisions that minimize `sum of terms + price * bytes`, at the highest price at which what
    is left fits: every head in its room, with a price for each KV head; or, where the policy pools, the heads of a
    layer together, with one price for all.

    Parameters
    ----------
    key_terms, value_terms : `[b, Hkv, G, NB]` each
        What each block adds to the bound, one array a precision as in `ReadCosts`, the last with originals.
    room : `[b, Hkv, G]`
        What the bound of a head may come to; pooled, what the root mean square over heads may.
    e_arith : `[b, Hkv, G]`
        The part of the bound that no reading removes. A head without more room than that gives up.
    active : `[b, 1, 1, NB]` bool
        Blocks read from tier 1.
    """
    hopeless = ~(room > e_arith)
    # In shares of the room; a head that has given up asks for nothing.
    scale = jnp.where(hopeless, jnp.inf, room)[..., None]
    keys, values = ([t / scale for t in terms] for terms in (key_terms, value_terms))
    floor = jnp.where(hopeless, 0.0, e_arith / scale[..., 0])
    key_bytes, value_bytes = (_prices(table, policy.host_price) for table in (costs.keys, costs.values))

    def choose(price, weight):  # [b, Hkv] or [b, 1], [b, Hkv, G]
        price = jnp.exp2(price)[..., None]
        if policy.pooled:
            joint_k, joint_v = ([(t * weight[..., None]).sum(2) for t in terms] for terms in (keys, values))
        else:
            joint_k, joint_v = ([t.max(2) for t in terms] for terms in (keys, values))  # [b, Hkv, NB]
        return _cheapest(joint_k, key_bytes, price), _cheapest(joint_v, value_bytes, price)

    def left(k, v):
        return (_at(keys, k[:, :, None]) + _at(values, v[:, :, None])).sum(-1) + floor  # [b, Hkv, G]

    def search(weight):
        def halve(_, bracket):
            low, high = bracket
            price = 0.5 * (low + high)
            rest = left(*choose(price, weight))
            together = jnp.mean(rest * rest, (1, 2), keepdims=True)[..., 0] <= 1
            fits = together if policy.pooled else (rest <= 1).all(-1)
            return jnp.where(fits, price, low), jnp.where(fits, high, price)

        shape = (room.shape[0], 1) if policy.pooled else room.shape[:2]
        low, _ = lax.fori_loop(0, BISECTIONS, halve, (jnp.full(shape, -60.0), jnp.full(shape, 60.0)))
        # A little below what was found: at the very price two evaluations may settle a tie differently.
        return choose(low - 2.0**-12, weight)

    k, v = search(jnp.ones_like(room))
    if policy.pooled:
        # What a head leaves counts by its square: once more, with the weights that the first answer suggests.
        k, v = search(jnp.minimum(left(k, v) + 0.1, 10.0))
    read = active[:, :, 0]
    promoted_k, promoted_v = (k == len(keys) - 1) & read, (v == len(values) - 1) & read
    n_promoted = promoted_k.sum(-1) + promoted_v.sum(-1)
    costly = n_promoted > policy.max_promoted * 2 * read.sum(-1)
    give_up = hopeless.any(-1) | costly  # [b, Hkv]: dense attention reads for all heads of the group
    keep = (read & ~give_up[..., None])[:, :, None]
    shape = (*room.shape, read.shape[-1])
    promoted = [jnp.broadcast_to(x[:, :, None] & keep, shape) for x in (promoted_k, promoted_v)]
    return Plan(
        key_level=jnp.where(promoted_k | ~read, 0, k),
        value_level=jnp.where(promoted_v | ~read, 0, v),
        keys=promoted[0],
        values=promoted[1],
        raised=promoted[0].any(-1),
        give_up=jnp.broadcast_to(give_up[..., None], room.shape),
    )


def further(plan: Plan, more: Plan) -> Plan:
    """The finer of two plans, block by block: what was read once stays read."""
    keys, values = plan.keys | more.keys, plan.values | more.values
    return Plan(
        key_level=jnp.where(keys.any(2), 0, jnp.maximum(plan.key_level, more.key_level)),
        value_level=jnp.where(values.any(2), 0, jnp.maximum(plan.value_level, more.value_level)),
        keys=keys,
        values=values,
        raised=keys.any(-1),
        give_up=plan.give_up | more.give_up,
    )


def plan_bytes(costs: ReadCosts, plan: Plan, active: jax.Array) -> jax.Array:
    """Bytes of tier 1 that a plan reads for a KV head: `[b, Hkv]` float32. `active`: [b, 1, 1, NB]."""
    # Values of a block that every head of the group replaces by originals are not read.
    value_level = jnp.where(plan.values.all(2), 0, plan.value_level)
    per_block = costs.always + bytes_of(costs.keys, plan.key_level) + bytes_of(costs.values, value_level)
    return jnp.where(active[:, :, 0], per_block, 0).sum(-1)


def _prices(table: tuple[int, ...], host_price: float) -> list[float]:
    """Costs in units of a block of originals on the device."""
    unit = table[-1]
    return [n / unit for n in table[:-1]] + [host_price]


def _cheapest(terms: list[jax.Array], cost: list[float], price: jax.Array) -> jax.Array:
    """Index of the least `term + price * cost`, the first where two are equal: int32."""
    best, index = terms[0] + price * cost[0], jnp.zeros(terms[0].shape, jnp.int32)
    for i in range(1, len(terms)):
        total = terms[i] + price * cost[i]
        better = total < best
        best, index = jnp.where(better, total, best), jnp.where(better, i, index)
    return index


def _at(terms: list[jax.Array], index: jax.Array) -> jax.Array:
    """`terms[index]`, element by element."""
    picked = terms[0]
    for i in range(1, len(terms)):
        picked = jnp.where(index == i, terms[i], picked)
    return picked


def _descending(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rank of each entry of the last axis in descending order (ties by position), and the sorted values."""
    order = jnp.argsort(-x, axis=-1, stable=True)
    places = jnp.broadcast_to(jnp.arange(x.shape[-1]), x.shape)
    rank = jnp.put_along_axis(jnp.zeros_like(order), order, places, axis=-1, inplace=False)
    return rank, jnp.take_along_axis(x, order, -1)
