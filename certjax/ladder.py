"""Rungs 3 and 4: which heads fall back to dense attention over the originals, and what is returned.

Refinement of tier 1 and rungs 1 and 2 (promotion of key and value blocks) are in the plan; this file climbs the rest.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from certjax.attempt import Attempt, Checks
from certjax.cache import TieredKVCache
from certjax.certificate import Certificate
from certjax.costs import read_costs
from certjax.policy import Policy
from certjax.reading import Problem
from certjax.select import Plan, plan_bytes
from pallas_kernels import numerics as num
from pallas_kernels.dense.reference import Originals, dense_heads, dense_heads_together


@struct.dataclass
class Returned:
    """What is going to be returned, as the ladder is climbed. Leaves `[b, Hkv, G]` but `out`."""

    out: jax.Array  # [b, Hkv, G, d]
    e_total: jax.Array
    dense: jax.Array  # bool
    tolerance: jax.Array  # for this output
    need: jax.Array  # bool, still to be made dense


def absolute_tolerance(policy: Policy, out: jax.Array) -> jax.Array:
    """The budget in units of the output: `[b, Hkv, G, d]` -> `[b, Hkv, G]`; infinite without a tolerance.

    "layer" is relative to the norm of the layer's concatenated heads over sqrt(Hq).
    """
    if policy.tolerance is None:
        return jnp.full(out.shape[:-1], jnp.inf)
    if policy.relative_to == "absolute":
        return jnp.full(out.shape[:-1], policy.tolerance)
    # Scaled, so that no square overflows or vanishes.
    unit = jnp.clip(jnp.abs(out).max((1, 2, 3), keepdims=True), 2.0**-100, 2.0**100)
    squared = ((out / unit) ** 2).sum(-1)
    if policy.relative_to == "layer":
        squared = jnp.broadcast_to(squared.mean((1, 2), keepdims=True), squared.shape)
    norm = jnp.sqrt(squared) * unit[..., 0]
    # An infinite or undefined norm allows nothing.
    return jnp.where(jnp.isfinite(norm), policy.tolerance * norm, 0.0)


def allotted(policy: Policy, out: jax.Array, e_total: jax.Array) -> jax.Array:
    """The tolerance of each head `[b, Hkv, G]`, given outputs and their bounds.

    Pooled, the bounds themselves are scaled to the root mean square that is allowed: they fit if and only if none
    exceeds its share.
    """
    tolerance = absolute_tolerance(policy, out)
    if policy.tolerance is None or not policy.pooled:
        return tolerance
    largest = e_total.max((1, 2), keepdims=True)
    usable = (largest > 0) & jnp.isfinite(largest)
    # Scaled, so that no square overflows or vanishes, by what has a normal reciprocal.
    shares = e_total / jnp.where(usable, jnp.clip(largest, 2.0**-100, 2.0**100), 1.0)
    rms = jnp.sqrt(jnp.square(shares).mean((1, 2), keepdims=True))
    # Bounds of zero leave every head the whole; an infinite or undefined bound fits nothing.
    fitted = jnp.where(usable, tolerance / jnp.where(usable, rms, 1.0) * shares, 0.0)
    return jnp.where(largest == 0, tolerance, fitted)


def originals_of(cache: TieredKVCache) -> Originals:
    """All originals of one sequence and KV head, from tier 2."""

    def read(row, head):
        return cache.page_in(row, head, 0, cache.capacity)

    return read


def attend_densely(
    cache: TieredKVCache, q: jax.Array, wanted: jax.Array, out: jax.Array, error: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """`dense_heads` of the cache's originals, wherever they are."""
    on_device = cache.originals()
    if on_device is None:
        return dense_heads(q, originals_of(cache), cache.length, wanted, out, error)
    return dense_heads_together(q, *on_device, cache.length, wanted, out, error)


def climb(
    policy: Policy,
    problem: Problem,
    cache: TieredKVCache,
    plan: Plan,
    candidate: Attempt,
    passed: Checks,
    sound: jax.Array,
) -> tuple[jax.Array, Certificate]:
    """Fall back where a check failed or the bound exceeds the tolerance; return outputs and certificates.

    `sound`: [b, Hkv] outcome of the preconditions. A canary or precondition failure takes the whole layer of
    that sequence (rung 4), everything else its own head (rung 3).
    """
    layer_failed = ~(sound.all(1) & passed.canary.all((1, 2)))  # [b]
    forced = plan.give_up | ~passed.ranking | ~passed.boundary | layer_failed[:, None, None]

    def judged(out, e_total, dense) -> Returned:
        tolerance = allotted(policy, out, e_total)
        over = ~(e_total <= tolerance) & ~dense
        if policy.tolerance is None:
            over = jnp.zeros_like(dense)
        elif policy.pooled:  # the group with the largest bound goes first: the others may fit without it
            worst = jnp.where(over, jnp.where(jnp.isnan(e_total), jnp.inf, e_total), -1.0).max(-1, keepdims=True)
            over &= worst == worst.max(1, keepdims=True)
        return Returned(out=out, e_total=e_total, dense=dense, tolerance=tolerance, need=(forced | over) & ~dense)

    def make_dense(state: Returned) -> Returned:
        need = state.need
        out, error = attend_densely(cache, problem.q, need.any(-1), state.out, state.e_total)
        return judged(
            out=jnp.where(need[..., None], out, state.out),
            e_total=jnp.where(need, error, state.e_total),
            dense=state.dense | need,
        )

    # A dense head changes the layer's norm and with it the tolerance of the others: repeat until all hold.
    # Usually no round or one; each round adds heads, so there are at most Hq. No head in need, no work.
    # `need` is carried, not computed again by the condition: two evaluations of a norm may differ by an ulp.
    start = judged(candidate.out, candidate.e_total, jnp.zeros(forced.shape, bool))
    final = lax.while_loop(lambda state: state.need.any(), make_dense, start)
    return final.out, _certificate(policy, problem, cache, plan, candidate, passed, sound, layer_failed, final)


def _certificate(
    policy, problem, cache, plan, candidate, passed, sound, layer_failed, final
) -> Certificate:
    dense, zero = final.dense, jnp.zeros(final.e_total.shape)
    k_star, n_values = plan.keys.sum(-1), plan.values.sum(-1)
    climbed = jnp.where(n_values > 0, 2, jnp.where(plan.raised, 1, 0))
    rung = jnp.where(dense, jnp.where(layer_failed[:, None, None], 4, 3), climbed)
    left = jnp.where(problem.active & ~plan.keys, candidate.mass, 0.0).sum(-1)

    def returned(quantized, exact=zero):
        return jnp.where(dense, exact, quantized)

    def per_head(x):
        return jnp.broadcast_to(x[:, :, None], dense.shape)

    return Certificate(
        e_key=returned(candidate.e_key),
        e_val=returned(candidate.e_val),
        e_arith=returned(candidate.e_arith, final.e_total),
        e_total=final.e_total,
        e_key_paper=returned(candidate.e_key_paper),
        e_val_paper=returned(candidate.e_val_paper),
        e_key_candidate=candidate.e_key,
        e_val_candidate=candidate.e_val,
        e_arith_candidate=candidate.e_arith,
        e_total_candidate=candidate.e_total,
        e_key_paper_candidate=candidate.e_key_paper,
        e_val_paper_candidate=candidate.e_val_paper,
        out_norm=num.norm_up(final.out),
        out_norm_candidate=num.norm_up(candidate.out),
        tolerance=final.tolerance,
        tail_mass=left,
        delta_max=candidate.delta_max,
        k_star=k_star.astype(jnp.int32),
        n_value_promoted=n_values.astype(jnp.int32),
        n_key_refined=per_head(_count(problem, plan.key_level > 0)),
        n_value_refined=per_head(_count(problem, plan.value_level > 1)),
        n_value_skipped=per_head(_count(problem, (plan.value_level == 0) & ~plan.values.any(2))),
        rung=rung.astype(jnp.int32),
        ranking_ok=passed.ranking,
        boundary_ok=passed.boundary,
        canary_ok=passed.canary,
        precondition_ok=per_head(sound),
        bytes_read=_bytes_read(policy, problem, cache, plan),
        bytes_paged_in=_bytes_paged_in(cache, plan, passed, dense),
    )


def _count(problem: Problem, blocks: jax.Array) -> jax.Array:
    """Blocks of tier 1 among `[b, Hkv, NB]`: `[b, Hkv]` int32."""
    return (blocks & problem.active[:, :, 0]).sum(-1).astype(jnp.int32)


def _bytes_read(policy: Policy, problem: Problem, cache: TieredKVCache, plan: Plan) -> jax.Array:
    """Bytes read on the device for a KV head, charged to its first query head: `[b, Hkv, G]` float32."""
    tier1 = plan_bytes(read_costs(cache), plan, problem.active)
    token = 2 * cache.head_dim * cache.ring_keys.dtype.itemsize
    windows = problem.window_live.sum(-1) * float(token)  # [b]
    scrubbed = -(-cache.n_blocks // policy.scrub) * _stored_bytes_of_a_block(cache) if policy.scrub else 0
    return jnp.zeros(plan.give_up.shape).at[:, :, 0].set(tier1 + windows[:, None] + float(scrubbed))


def _stored_bytes_of_a_block(cache: TieredKVCache) -> int:
    n = cache.notes.checksum.size
    return sum(x.size // n * x.dtype.itemsize for x in jax.tree.leaves((cache.codes, cache.notes)))


def _bytes_paged_in(cache: TieredKVCache, plan: Plan, passed: Checks, dense: jax.Array) -> jax.Array:
    """Bytes read from tier 2, each charged once, to the first query head of the group that asked."""
    token = cache.head_dim * cache.host_keys.dtype.itemsize
    block = cache.block_size * token

    def first(asked):  # [b, Hkv, G, ...]: keep the first query head
        return asked & (jnp.cumsum(asked, 2) == 1)

    explored = passed.pages & ~plan.keys.any(2)
    blocks = first(plan.keys).sum(-1) + first(plan.values).sum(-1)
    blocks = blocks.at[:, :, 0].add(explored.sum(-1))
    return blocks * float(block) + first(dense) * float(2 * token * cache.capacity)
