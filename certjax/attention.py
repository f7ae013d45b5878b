"""Certified attention of one decode step: score, select, attend, certify, climb.

The public functions take `q` as `[batch, Hq, d]`; inside, heads are grouped by KV head, `[b, Hkv, G, d]`,
because the `G` query heads of a group share keys, values and page-ins.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from certjax import attempt as att
from certjax import checks, ladder, select
from certjax.cache import TieredKVCache
from certjax.certificate import Certificate
from certjax.errors import InvalidArgumentError
from certjax.policy import Policy
from pallas_kernels import numerics as num
from pallas_kernels.attend.reference import block_log_mass
from pallas_kernels.dense.reference import dense_heads
from pallas_kernels.promote.reference import promoted_scores, promoted_values


def certified_attention(
    q: jax.Array, cache: TieredKVCache, policy: Policy
) -> tuple[jax.Array, Certificate]:
    """Attention over a tiered cache with a bound on its error, computed in the same pass.

    Parameters
    ----------
    q : `[batch, Hq, d]`
        One query per head, after RoPE. Taken as exact in its own dtype.
    cache
        One layer (or a view of one); its tokens are all visible to the query.
    policy
        Static under jit.

    Returns
    -------
    out : `[batch, Hq, d]` float32
        For every head, `||out - O*|| <= certificate.e_total`, `O*` exact attention over the originals.
    certificate : leaves `[batch, Hq]`

    Raises
    ------
    InvalidArgumentError
        If `q` does not fit the cache.
    MissingTier2Error
        If the originals are missing or not in host memory.
    """
    cache.require_tier2()
    groups = _grouped(q, cache)
    problem = att.build(groups, cache)
    first = att.quantized(problem, policy)

    plan = _plan(policy, problem, first)
    explored = _explored(policy, problem, cache)

    def promote(_):
        return _promoted(policy, problem, cache, plan, explored)

    def keep(_):
        ok = jnp.ones(first.e_total.shape, bool)
        return first, att.Checks(ranking=ok, boundary=ok, canary=ok, pages=jnp.zeros(explored.shape, bool))

    if policy.kind == "paper":  # at least k_min blocks are always promoted: no branch to take
        candidate, passed = promote(None)
    else:
        candidate, passed = lax.cond(plan.any | explored.any(), promote, keep, None)

    sound = _preconditions(policy, problem, cache, candidate)
    out, certificate = ladder.climb(policy, problem, cache, plan, candidate, passed, sound)
    return _flat(out), jax.tree.map(lambda x: x.reshape(x.shape[0], -1), certificate)


def naive_attention(q: jax.Array, cache: TieredKVCache) -> jax.Array:
    """Attention over tier 1 and the windows alone, nothing checked: `[batch, Hq, d]` float32."""
    problem = att.build(_grouped(q, cache), cache)
    return _flat(att.unchecked(problem))


def dense_attention(q: jax.Array, cache: TieredKVCache) -> jax.Array:
    """Exact attention over the originals in tier 2, head by head: `[batch, Hq, d]` float32.

    The same function as the ladder's dense rungs.

    Raises
    ------
    InvalidArgumentError, MissingTier2Error
        As `certified_attention`.
    """
    cache.require_tier2()
    groups = _grouped(q, cache)
    wanted = jnp.ones(groups.shape[:2], bool)
    originals = ladder.originals_of(cache)
    return _flat(dense_heads(groups, originals, cache.length, wanted, jnp.zeros(groups.shape))[0])


def _plan(policy: Policy, problem: att.Problem, first: att.Attempt) -> select.Plan:
    if policy.kind == "paper":
        return select.paper_plan(policy, first.mass, problem.eta_max, problem.active)
    tolerance = ladder.absolute_tolerance(policy, first.out)
    key_terms, value_terms = att.block_terms(problem, first)
    exceeds = ~(first.e_total <= tolerance)
    return select.budget_plan(
        policy, key_terms, value_terms, first.e_arith, exceeds, tolerance, problem.active
    )


def _explored(policy: Policy, problem: att.Problem, cache: TieredKVCache) -> jax.Array:
    """Blocks the canary reads although nobody needs them: `[b, Hkv, NB]` bool, other ones every step."""
    shape = problem.nu.shape[:-1]
    if policy.exploration == 0:
        return jnp.zeros(shape, bool)
    key = jax.random.fold_in(jax.random.key(policy.seed), cache.length.sum())
    key = key if cache.layer is None else jax.random.fold_in(key, cache.layer)
    return jax.random.bernoulli(key, policy.exploration, shape) & problem.active[:, :, 0]


def _promoted(policy, problem: att.Problem, cache: TieredKVCache, plan: select.Plan, explored: jax.Array):
    """Attend again with the planned originals, and run the checks that their reading makes possible."""
    size = cache.block_size

    def keys_of(row, head, block):
        return cache.page_in_keys(row, head, block * size, size)

    def values_of(row, head, block):
        return cache.page_in_values(row, head, block * size, size)

    pages = plan.keys.any(2) | explored
    exact = promoted_scores(problem.q, problem.scores, pages, keys_of)
    weights = att.weights(problem, jnp.where(plan.keys[..., None], exact, problem.scores))
    summed, residual = promoted_values(weights.tier1, plan.values, problem.v_hat, values_of)
    result = att.evaluate(problem, policy, weights, plan, summed)

    ok = jnp.ones(plan.give_up.shape, bool)
    ranking = boundary = canary = ok
    if policy.ranking_depth:
        before, after = block_log_mass(problem.scores), block_log_mass(exact)
        ranking = checks.ranking_ok(before, after, plan.keys, policy.ranking_depth)
        boundary = checks.boundary_ok(
            before, problem.delta.max(-1), after, plan.keys, problem.active,
            policy.ranking_depth, policy.eps_guard,
        )  # fmt: skip
    if policy.canary:
        canary = checks.scores_consistent(problem.scores, exact, problem.delta, problem.eps, pages)
        canary &= checks.values_consistent(residual, problem.eta)[:, :, None]
    return result, att.Checks(ranking=ranking, boundary=boundary, canary=canary, pages=pages)


def _preconditions(policy, problem: att.Problem, cache: TieredKVCache, candidate: att.Attempt) -> jax.Array:
    """P1 and P3 (P2 shows as a non-finite annotation, hence bound): `[b, Hkv]` bool."""
    finite = jnp.where(problem.active[..., None], jnp.isfinite(problem.scores), True).all((-2, -1))
    finite &= jnp.where(problem.window_live[:, None, None], jnp.isfinite(problem.window_scores), True).all(-1)
    finite &= jnp.isfinite(candidate.out).all(-1) & ~jnp.isnan(problem.delta).any((-2, -1))
    sound = finite.all(-1)
    return sound & checks.fingerprints_ok(cache, policy.scrub) if policy.scrub else sound


def _grouped(q: jax.Array, cache: TieredKVCache) -> jax.Array:
    batch, n_kv_heads, _, d = cache.ring_keys.shape
    if q.ndim != 3 or q.shape[0] != batch or q.shape[2] != d or q.shape[1] % n_kv_heads:
        raise InvalidArgumentError(
            f"q must be [batch, Hq, d] with batch={batch}, d={d} and Hq a multiple of Hkv={n_kv_heads}; "
            f"got {q.shape}."
        )
    return num.representable(q.astype(jnp.float32), q.dtype).reshape(batch, n_kv_heads, -1, d)


def _flat(out: jax.Array) -> jax.Array:
    return out.reshape(out.shape[0], -1, out.shape[-1])
