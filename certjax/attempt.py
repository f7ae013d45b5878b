"""A quantized attempt at one step: softmax weights and decoded values in, an output with its certified bound out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from certjax.bounds import arithmetic, centred, paper, spectral
from certjax.cache import TieredKVCache
from certjax.reading import Keys, Problem, Values, turning_error
from certjax.select import Plan
from pallas_kernels import numerics as num
from pallas_kernels.attend.reference import Attended, Weights, attend_reference, softmax_weights


@struct.dataclass
class Attempt:
    """An output and its bound, before the ladder. Leaves `[b, Hkv, G]` unless noted."""

    out: jax.Array  # [b, Hkv, G, d]
    mass: jax.Array  # [b, Hkv, G, NB]
    offset: jax.Array  # h = ||c - O^|| + E_val, with the rounding of O^
    e_key: jax.Array
    e_val: jax.Array
    e_arith: jax.Array
    e_total: jax.Array
    e_key_paper: jax.Array
    e_val_paper: jax.Array
    delta_max: jax.Array


@struct.dataclass
class Checks:
    """Outcomes that depend on what was read: `[b, Hkv, G]` bool, and the blocks paged in `[b, Hkv, NB]`."""

    ranking: jax.Array
    boundary: jax.Array
    canary: jax.Array
    finite: jax.Array
    pages: jax.Array


def weights(problem: Problem, scores: jax.Array) -> Weights:
    """Softmax numerators for `scores` (tier 1, possibly rescored) and the windows."""
    return softmax_weights(scores, problem.window_scores)


def unchecked(problem: Problem, cache: TieredKVCache, keys: Keys, values: Values) -> jax.Array:
    """The output with nothing promoted, alone (the bound is dead code to the compiler)."""
    return _attend(problem, cache, weights(problem, keys.scores), keys.delta, values.eta[:, :, None], values).out


def _attend(problem: Problem, cache: TieredKVCache, w: Weights, delta, eta, values: Values, *rest) -> Attended:
    return attend_reference(
        w, delta, eta, problem.nu, problem.window_nu, values.y, problem.window_values,
        cache.codec.from_basis if cache.codec.centred else None,
        None if values.relative is None else problem.centre, values.relative, *rest,
    )  # fmt: skip


def evaluate(
    problem: Problem,
    cache: TieredKVCache,
    keys: Keys,
    values: Values,
    w: Weights,
    plan: Plan,
    promoted_values: jax.Array | None,
) -> Attempt:
    """Attend with weights `w` and bound the result.

    `plan` says which blocks `w` was computed with original keys for, and which blocks' values `promoted_values`
    (`[b, Hkv, G, d]`, sum of w v; None where nothing can be promoted) accounts for.
    """
    delta = jnp.where(plan.keys[..., None], 0.0, keys.delta)
    delta_paper = jnp.where(plan.keys, 0.0, keys.delta_paper)
    eta = jnp.where(plan.values[..., None], 0.0, values.eta[:, :, None])
    quantized, left = problem.active & ~plan.values, problem.active & ~plan.keys
    done = _attend(problem, cache, w, delta, eta, values, quantized, promoted_values)
    sums, mass = done.sums, done.p.sum(-1)

    deepest = problem.depth(promoted=promoted_values is not None)
    per_group = plan.values.any((2, 3))[:, :, None]
    depth_error = jnp.where(per_group, num.gamma(deepest), num.gamma(problem.depth(promoted=False)))
    accumulated = arithmetic.accumulation(sums, num.norm_up(problem.centre), depth_error, turning_error(cache))
    # Twice: `out` as returned and `out` as the compiler may recompute it for this line are both within
    # `accumulated` of the real O^, and need not be equal.
    from_centre = num.norm_up(problem.centre[:, :, None] - done.out) + 2 * accumulated
    e_val = centred.e_val(sums)
    if values.spectral is not None:
        sigma = jnp.where(plan.values, 0.0, values.spectral[:, :, None])
        e_val = num.sum_tokens(spectral.value_terms(done.p, eta, sigma))
    offset = from_centre + e_val
    delta_max = delta.max((-2, -1))
    linear = e_key = centred.e_key(sums, offset)
    if keys.spectral is not None:
        x = problem.nu[:, :, None] + offset[..., None, None]
        coefficient = jnp.where(plan.keys, 0.0, keys.spectral)
        e_key = num.sum_tokens(spectral.key_terms(done.p, delta, x, coefficient)) / sums.l_minus
    linear, e_key = (jnp.where(delta_max < num.MAX_DELTA, e, jnp.inf) for e in (linear, e_key))
    n_tokens = delta.shape[-2] * delta.shape[-1] + problem.window_live.shape[-1]
    e_arith = arithmetic.e_arith(
        sums, linear, offset, problem.nu_max[..., None] + eta.max((-2, -1)), delta_max, problem.eps, accumulated,
        n_tokens,
    )  # fmt: skip
    # Nothing can be further from O* than the values reach: O* lies within nu_max of the centre.
    trivial = problem.nu_max[..., None] + from_centre
    total = e_key + e_val + e_arith
    total = jnp.minimum(*(jnp.where(jnp.isnan(x), jnp.inf, x) for x in (total, trivial)))
    return Attempt(
        out=done.out,
        mass=mass,
        offset=offset,
        e_key=e_key,
        e_val=e_val,
        e_arith=e_arith,
        e_total=total * arithmetic.inflate(deepest) + num.ABSOLUTE_FLOOR,
        e_key_paper=paper.e_key_paper(
            problem.nu_max[..., None], delta_paper.max(-1), jnp.where(left, mass, 0.0).sum(-1)
        ),
        e_val_paper=paper.e_val_paper(mass, values.eta_max, quantized),
        delta_max=delta_max,
    )
