"""Which blocks to promote: the two selection policies.

Both see one tier-1 pass and return a `Plan`; neither touches the cache. A head whose plan would cost more
than dense attention gives up at once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from certjax.policy import Policy


@struct.dataclass
class Plan:
    """What to read from tier 2. Leaves `[b, Hkv, G, NB]` bool, `[b, Hkv, G]` bool."""

    keys: jax.Array  # blocks to attend with original keys (set F)
    values: jax.Array  # blocks to attend with original values (set W)
    raised: jax.Array  # rung 1: key blocks beyond the base set
    give_up: jax.Array  # dense at once

    @property
    def any(self) -> jax.Array:
        """Whether any block of any head is to be read: `[]` bool."""
        return self.keys.any() | self.values.any()


def paper_plan(policy: Policy, mass: jax.Array, eta_max: jax.Array, active: jax.Array) -> Plan:
    """Promote keys by descending mass up to a coverage, values by `p_b eta_b > v_tol`.

    Parameters
    ----------
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
    return Plan(
        keys=(rank < k[..., None]) & active,
        values=(mass * eta_max > policy.v_tol) & active,
        raised=raised,
        give_up=jnp.zeros(raised.shape, bool),
    )


def budget_plan(
    policy: Policy,
    key_terms: jax.Array,
    value_terms: jax.Array,
    e_arith: jax.Array,
    exceeds: jax.Array,
    tolerance: jax.Array,
    active: jax.Array,
) -> Plan:
    """Promote in descending contribution to the bound until what is left fits the tolerance.

    Parameters
    ----------
    key_terms, value_terms : `[b, Hkv, G, NB]`
        What each block adds to E_key and to E_val.
    e_arith, tolerance : `[b, Hkv, G]`
        Arithmetic part of the bound, which no promotion removes, and the absolute tolerance.
    exceeds : `[b, Hkv, G]` bool
        Heads that need anything at all.
    active : `[b, 1, 1, NB]` bool
        Blocks read from tier 1.
    """
    n_blocks = key_terms.shape[-1]
    terms = jnp.concatenate([key_terms, value_terms], -1)
    terms = jnp.where(jnp.concatenate([active, active], -1), terms, 0.0)
    allowed = policy.margin * tolerance - e_arith
    chosen = _largest_until(terms, allowed) & (terms > 0)
    give_up = exceeds & (~(allowed > 0) | (chosen.sum(-1) > policy.max_promoted * 2 * active.sum(-1)))
    chosen = chosen & (exceeds & ~give_up)[..., None]
    keys, values = chosen[..., :n_blocks], chosen[..., n_blocks:]
    return Plan(keys=keys, values=values, raised=keys.any(-1), give_up=give_up)


def _largest_until(terms: jax.Array, allowed: jax.Array) -> jax.Array:
    """The largest terms, so many that the sum of the others is at most `allowed`. [..., n], [...] -> bool.

    Equal terms go together, NaN counts as largest. A bisection on bit patterns (non-negative floats order as
    their bits do) that is exact after 31 steps, and several times cheaper than a sort on every back end.
    """
    bits = lax.bitcast_convert_type(terms.astype(jnp.float32), jnp.int32)

    def halve(i, threshold):
        higher = threshold + (jnp.int32(1) << (30 - i))
        left = jnp.where(bits < higher[..., None], terms, 0.0).sum(-1)
        return jnp.where(left <= allowed, higher, threshold)

    threshold = lax.fori_loop(0, 31, halve, jnp.zeros(terms.shape[:-1], jnp.int32))
    return bits >= threshold[..., None]


def _descending(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rank of each entry of the last axis in descending order (ties by position), and the sorted values."""
    order = jnp.argsort(-x, axis=-1, stable=True)
    places = jnp.broadcast_to(jnp.arange(x.shape[-1]), x.shape)
    rank = jnp.put_along_axis(jnp.zeros_like(order), order, places, axis=-1, inplace=False)
    return rank, jnp.take_along_axis(x, order, -1)
