"""Certified attention of one decode step: score, select, attend, certify, climb.

The public functions take `q` as `[batch, Hq, d]`; inside, heads are grouped by KV head, `[b, Hkv, G, d]`,
because the `G` query heads of a group share keys, values and page-ins.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from certjax import attempt as att
from certjax import checks, ladder, reading, select, terms
from certjax.cache import TieredKVCache
from certjax.certificate import Certificate
from certjax.costs import read_costs
from certjax.errors import InvalidArgumentError
from certjax.fused.append import Token, append, by_kernel
from certjax.fused.attention import fused_attention, fused_naive
from certjax.fused.chain import chained_attention
from certjax.fused.dispatch import FUSED, chained, kernels_of, pick_backend
from certjax.fused.operands import Shared, shared
from certjax.fused.project import Again, Project, as_it_is
from certjax.policy import Policy, require_policy
from pallas_kernels import numerics as num
from pallas_kernels.attend.reference import Weights, block_log_mass
from pallas_kernels.promote.reference import (
    promoted_scores,
    promoted_scores_together,
    promoted_values,
    promoted_values_together,
)

ROUNDS = 2
"""Plans a budget policy makes before it goes dense: the first on estimates, the second on what came of it."""


def certified_attention(
    q: jax.Array, cache: TieredKVCache, policy: Policy
) -> tuple[jax.Array, Certificate]:
    """Attention over a tiered cache with a bound on its error, computed in the same pass.

    Parameters
    ----------
    q : `[batch, Hq, d]`
        One query per head, after RoPE. Taken as exact in its own dtype.
    cache
        One layer (or a view of one); its tokens are all visible to the query. Batched already: `vmap` and reverse-mode
        `grad` do not go through originals in host memory, or the ladder's loops.
    policy
        Static under jit. How tier 1 is stored (codec, blocks, windows) is the cache's business; this says what is
        certified, and what is done about it.

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
        If the originals are missing, or not in the memory that the cache's policy says.
    """
    require_policy(policy)
    cache.require_tier2()
    groups = _grouped(q, cache)
    backend = pick_backend(policy, cache, q.shape[1])
    if backend in FUSED and cache.layer is None:  # a view of one layer has been copied out of the stack already
        sound = cache.holds_all
        if policy.scrub:
            sound &= checks.fingerprints_ok(cache, policy.scrub).all(1)
        attend = _fused(policy, backend, groups)
        out, certificate, *_ = attend(groups, cache.stacked(), jnp.int32(0), sound=sound)
        return _flat(out), _flat_record(certificate)
    problem = reading.build(groups, cache)
    attempt = {"paper": _by_mass, "budget": _within_budget, "observe": _as_stored}[policy.kind]
    plan, candidate, passed = attempt(policy, problem, cache)
    sound = _preconditions(policy, problem, cache, candidate, passed)
    out, certificate = ladder.climb(policy, problem, cache, plan, candidate, passed, sound)
    return _flat(out), _flat_record(certificate)


def common_to_layers(
    cache: TieredKVCache, policy: Policy, n_query_heads: int, *, naive: bool = False
) -> Shared | None:
    """What the layers of a step have in common, where the kernels are fused: computed once a step, for
    `certified_layer` or for `naive_layer`."""
    fused = pick_backend(policy, cache, n_query_heads) in FUSED
    return shared(cache, naive or policy.tolerance is None) if fused else None


def certified_layer(
    q: jax.Array,
    cache: TieredKVCache,
    layer: jax.Array,
    policy: Policy,
    common: Shared | None = None,
    project: Project = as_it_is,
    again: Again | None = None,
    token: Token | None = None,
) -> tuple[jax.Array, Certificate, jax.Array | None, TieredKVCache]:
    """`certified_attention` for layer `layer` of a stacked cache, as a decode loop calls it, with what is
    `common_to_layers`; what `cache.plan` is to have for the layer at the next step, where it is to change; and the
    cache with `token` in it, which is counted already but stored nowhere, where there is one.

    `project`: what is done next with the output, `[batch, Hq, d]` float32, and is returned in its place. While kernels
    find out whether a candidate's bound holds, it is projected. `again(projected, out, revised)` keeps that, or
    projects what has taken its place, where `revised` `[batch Hkv]` int32 has anything but 0 (`fused.project` says
    when there is one); without it what is returned is `project` of the output.

    Fused kernels read the stack in place and take `cache.sound` for the outcome of the fingerprints, and of whether
    there is a place for the token, which `decode.step` checks once a step for all layers.
    """
    backend = pick_backend(policy, cache, q.shape[1])
    groups = _grouped(q, cache)
    attend = _fused(policy, backend, groups) if backend in FUSED else None
    in_chain = attend is not None and attend.func is chained_attention
    if again is not None and not in_chain:
        raise InvalidArgumentError(
            "again: nothing is projected before it is certain but in a chain of kernels; leave it out."
        )
    if token is not None and not (in_chain and by_kernel(cache)):
        cache, token = append(cache, *token, layer, policy, q.shape[1]), None
    if attend is None:
        out, certificate = certified_attention(q, cache.at(layer), policy)
        return project(out), certificate, None, cache
    cache.require_tier2()
    attend = functools.partial(attend, sound=cache.sound, common=common, project=lambda out: project(_flat(out)))
    if in_chain:
        project_again = None if again is None else lambda y, out, revised: again(y, _flat(out), revised)
        out, certificate, plan, cache = attend(groups, cache, layer, again=project_again, token=token)
    else:
        out, certificate, plan = attend(groups, cache, layer)
    return out, _flat_record(certificate), plan, cache


def _fused(policy: Policy, backend: str, groups: jax.Array):
    kernels = kernels_of(backend, groups.shape[0] * groups.shape[1])
    attend = chained_attention if chained(policy, kernels) else fused_attention
    return functools.partial(attend, policy=policy, kernels=kernels)


def naive_layer(
    q: jax.Array, cache: TieredKVCache, layer: jax.Array, policy: Policy, common: Shared | None = None
) -> jax.Array:
    """`naive_attention` for layer `layer` of a stacked cache."""
    backend = pick_backend(policy, cache, q.shape[1])
    if backend not in FUSED:
        return naive_attention(q, cache.at(layer))
    groups = _grouped(q, cache)
    kernels = kernels_of(backend, groups.shape[0] * groups.shape[1])
    return _flat(fused_naive(groups, cache, layer, policy, kernels, common))


def naive_attention(q: jax.Array, cache: TieredKVCache) -> jax.Array:
    """Attention over tier 1 and the windows alone, nothing checked: `[batch, Hq, d]` float32."""
    problem = reading.build(_grouped(q, cache), cache)
    keys, values, _ = _finest(problem, cache)
    return _flat(att.unchecked(problem, cache, keys, values))


def dense_attention(q: jax.Array, cache: TieredKVCache) -> jax.Array:
    """Exact attention over the originals in tier 2: `[batch, Hq, d]` float32.

    The same function as the ladder's dense rungs.

    Raises
    ------
    InvalidArgumentError, MissingTier2Error
        As `certified_attention`.
    """
    cache.require_tier2()
    groups = _grouped(q, cache)
    wanted = jnp.ones(groups.shape[:2], bool)
    return _flat(ladder.attend_densely(cache, groups, wanted, jnp.zeros(groups.shape))[0])


def _finest(problem: reading.Problem, cache: TieredKVCache):
    """Tier 1 as precise as it is stored: keys, values, and the plan that reads them so."""
    levels = cache.codec.key_levels - 1, cache.codec.value_levels
    keys, values = reading.read_keys(problem, cache, levels[0]), reading.read_values(problem, cache, levels[1])
    return keys, values, select.tier1_plan(keys.delta_paper, *levels)


def _as_stored(policy: Policy, problem: reading.Problem, cache: TieredKVCache):
    """The observe policy: what naive attention returns, certified."""
    keys, values, plan = _finest(problem, cache)
    result = att.evaluate(problem, cache, keys, values, att.weights(problem, keys.scores), plan, None)
    ok = jnp.ones(plan.give_up.shape, bool)
    finite = _scores_finite(problem, keys)
    return plan, result, att.Checks(ok, ok, ok, finite, jnp.zeros(problem.nu.shape[:-1], bool))


def _by_mass(policy: Policy, problem: reading.Problem, cache: TieredKVCache):
    """The paper policy: promotion by the masses that tier 1 gives."""
    keys, values, tier1 = _finest(problem, cache)
    w = att.weights(problem, keys.scores)
    mass = (w.tier1 / w.total[..., None, None]).sum(-1)
    plan = select.paper_plan(policy, tier1, mass, values.eta_max, problem.active)
    return plan, *_attend(policy, problem, cache, plan, keys, values)


@struct.dataclass
class _Round:
    """What the rounds of a budget policy carry."""

    n: jax.Array  # [] int32
    plan: select.Plan
    candidate: att.Attempt
    passed: att.Checks
    need: jax.Array  # [b, Hkv, G] bool, heads above their tolerance that have not given up


def _within_budget(policy: Policy, problem: reading.Problem, cache: TieredKVCache):
    """The budget policy: read as little as the tolerance allows, and more where that was not enough."""
    costs = read_costs(cache)
    coarse = reading.read_keys(problem, cache, 0)
    seen = terms.scan(problem, coarse, att.weights(problem, coarse.scores))
    # The terms of values do not depend on how an attempt went; those of keys follow its distance from the centre.
    value_terms = terms.value_terms(problem, cache, seen, skip=policy.skip_values)

    def attend(plan, tolerance, offset, e_arith) -> tuple[select.Plan, att.Attempt, att.Checks]:
        key_terms = terms.key_terms(problem, cache, seen, offset)
        room = policy.margin * tolerance
        more = select.budget_plan(policy, costs, key_terms, value_terms, room, e_arith, problem.active)
        plan = select.further(plan, more)
        keys = lax.cond(
            (plan.key_level > 0).any(), lambda: reading.read_keys(problem, cache, plan.key_level), lambda: coarse
        )
        values = reading.read_values(problem, cache, plan.value_level)
        return plan, *_attend(policy, problem, cache, plan, keys, values)

    def again(state: _Round) -> _Round:
        tried = state.candidate
        first = state.n == 0
        tolerance = ladder.absolute_tolerance(policy, jnp.where(first, seen.out, tried.out))
        offset = jnp.where(first, seen.offset, tried.offset)
        plan, candidate, passed = attend(state.plan, tolerance, offset, jnp.where(first, 0.0, tried.e_arith))
        over = ~(candidate.e_total <= ladder.allotted(policy, candidate.out, candidate.e_total))
        return _Round(n=state.n + 1, plan=plan, candidate=candidate, passed=passed, need=over & ~plan.give_up)

    nothing = select.tier1_plan(coarse.delta_paper, 0, 0)
    unknown = jax.eval_shape(attend, nothing, seen.offset, seen.offset, seen.offset)[1:]
    candidate, passed = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), unknown)
    start = _Round(jnp.int32(0), nothing, candidate, passed, jnp.ones(seen.offset.shape, bool))
    final = lax.while_loop(lambda s: (s.n < ROUNDS) & s.need.any(), again, start)
    return final.plan, final.candidate, final.passed


def _explored(policy: Policy, problem: reading.Problem, cache: TieredKVCache) -> jax.Array:
    """Blocks the canary reads although nobody needs them: `[b, Hkv, NB]` bool, other ones every step."""
    shape = problem.nu.shape[:-1]
    if policy.exploration == 0:
        return jnp.zeros(shape, bool)
    key = jax.random.fold_in(jax.random.key(policy.seed), cache.length.sum())
    key = key if cache.layer is None else jax.random.fold_in(key, cache.layer)
    return jax.random.bernoulli(key, policy.exploration, shape) & problem.active[:, :, 0]


def _attend(policy: Policy, problem: reading.Problem, cache: TieredKVCache, plan: select.Plan,
            keys: reading.Keys, values: reading.Values) -> tuple[att.Attempt, att.Checks]:  # fmt: skip
    """Attend with the originals that the plan asks for, and run the checks that their reading makes possible."""
    explored = _explored(policy, problem, cache)
    pages = plan.keys.any(2) | explored
    exact = _rescored(problem, cache, keys, pages)
    w = att.weights(problem, jnp.where(plan.keys[..., None], exact, keys.scores))
    summed, residual = _summed(problem, cache, values, w, plan.values)
    result = att.evaluate(problem, cache, keys, values, w, plan, summed)

    ok = jnp.ones(plan.give_up.shape, bool)
    ranking = boundary = canary = ok
    if policy.ranking_depth:
        before, after = block_log_mass(keys.scores), block_log_mass(exact)
        ranking = checks.ranking_ok(before, after, plan.keys, policy.ranking_depth)
        boundary = checks.boundary_ok(
            before, keys.delta.max(-1), after, plan.keys, problem.active, policy.ranking_depth, policy.eps_guard
        )
    if policy.canary:
        canary = checks.scores_consistent(keys.scores, exact, keys.delta, problem.eps, pages)
        canary &= checks.values_consistent(residual, values.eta)[:, :, None]
    return result, att.Checks(ranking, boundary, canary, _scores_finite(problem, keys), pages)


def _rescored(problem: reading.Problem, cache: TieredKVCache, keys: reading.Keys, pages: jax.Array) -> jax.Array:
    """Scores `[b, Hkv, G, NB, B]`, of the blocks in `pages` `[b, Hkv, NB]` with their original keys."""
    on_device, size = cache.originals(), cache.block_size
    if on_device is not None:
        return promoted_scores_together(problem.q, keys.scores, pages, on_device[0])

    def keys_of(row, head, block):
        return cache.page_in_keys(row, head, block * size, size)

    return promoted_scores(problem.q, keys.scores, pages, keys_of)


def _summed(problem: reading.Problem, cache: TieredKVCache, values: reading.Values, w: Weights,
            promoted: jax.Array) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """What `promoted_values` returns of the blocks that are `promoted` `[b, Hkv, G, NB]`."""
    on_device, size, d = cache.originals(), cache.block_size, cache.head_dim
    if on_device is not None:
        decoded = values.y.reshape(*problem.nu.shape, d)
        if values.relative is not None:
            centre = jnp.where(values.relative[..., None, None], problem.centre[:, :, None, None], 0.0)
            decoded = cache.codec.from_basis(decoded) + centre
        return promoted_values_together(w.tier1, promoted, decoded, on_device[1])

    def values_of(row, head, block):
        return cache.page_in_values(row, head, block * size, size)

    def decoded_of(row, head, block):
        y = lax.dynamic_slice(values.y, (row, head, block * size, 0), (1, 1, size, d))[0, 0]
        if values.relative is None:
            return y
        return cache.codec.from_basis(y) + jnp.where(values.relative[row, head, block], problem.centre[row, head], 0.0)

    return promoted_values(w.tier1, promoted, d, decoded_of, values_of)


def _scores_finite(problem: reading.Problem, keys: reading.Keys) -> jax.Array:
    """P3 of what was read: `[b, Hkv, G]` bool."""
    finite = jnp.where(problem.active[..., None], jnp.isfinite(keys.scores), True).all((-2, -1))
    return finite & ~jnp.isnan(keys.delta).any((-2, -1))


def _preconditions(policy, problem: reading.Problem, cache: TieredKVCache, candidate, passed) -> jax.Array:
    """P1 and P3 (P2 shows as a non-finite annotation, hence bound), and P5: `[b, Hkv]` bool."""
    window = jnp.where(problem.window_live[:, None, None], jnp.isfinite(problem.window_scores), True).all(-1)
    sound = (window & passed.finite & jnp.isfinite(candidate.out).all(-1)).all(-1) & cache.holds_all[:, None]
    return sound & checks.fingerprints_ok(cache, policy.scrub) if policy.scrub else sound


def _grouped(q: jax.Array, cache: TieredKVCache) -> jax.Array:
    batch, n_kv_heads, _, d = cache.ring_keys.shape[-4:]
    q = jnp.asarray(q)
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise InvalidArgumentError(f"q must be floating point, one query per head; got {q.dtype}.")
    if q.ndim != 3 or q.shape[0] != batch or q.shape[2] != d or q.shape[1] % n_kv_heads:
        raise InvalidArgumentError(
            f"q must be [batch, Hq, d] with batch={batch}, d={d} and Hq a multiple of Hkv={n_kv_heads}; "
            f"got {q.shape}."
        )
    return num.representable(q.astype(jnp.float32), q.dtype).reshape(batch, n_kv_heads, -1, d)


def _flat_record(certificate: Certificate) -> Certificate:
    return jax.tree.map(lambda x: x.reshape(x.shape[0], -1), certificate)


def _flat(out: jax.Array) -> jax.Array:
    return out.reshape(out.shape[0], -1, out.shape[-1])
