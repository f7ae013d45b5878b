"""A quantized attempt at one step: what is attended, with which errors, and the bound that follows.

`Problem` holds what every attempt shares (scores with tier-1 keys, perturbations, decoded values);
`evaluate` turns softmax weights into an output with its certified bound.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from certjax.bounds import arithmetic, centred, paper
from certjax.bounds.perturbation import paper_delta, score_delta
from certjax.cache import TieredKVCache, ring_block_index
from certjax.policy import Policy
from certjax.select import Plan
from pallas_kernels import numerics as num
from pallas_kernels.attend.reference import (
    Sums,
    Weights,
    accumulation_depth,
    attend_reference,
    softmax_weights,
)


@struct.dataclass
class Problem:
    """One layer at one step. `Nw` counts the tokens of both windows."""

    q: jax.Array  # [b, Hkv, G, d] float32
    scores: jax.Array  # [b, Hkv, G, NB, B] with tier-1 keys, -inf where the block is not read from tier 1
    delta: jax.Array  # [b, Hkv, G, NB, B] Delta_t
    delta_paper: jax.Array  # [b, Hkv, G, NB]
    eps: jax.Array  # [b, Hkv, G] rounding of a computed score
    v_hat: jax.Array  # [b, Hkv, N, d] float32
    eta: jax.Array  # [b, Hkv, NB, B]
    nu: jax.Array  # [b, Hkv, NB, B]
    active: jax.Array  # [b, 1, 1, NB] bool, blocks read from tier 1
    window_scores: jax.Array  # [b, Hkv, G, Nw]
    window_values: jax.Array  # [b, Hkv, Nw, d] float32
    window_nu: jax.Array  # [b, Hkv, Nw]
    window_live: jax.Array  # [b, Nw] bool
    nu_max: jax.Array  # [b, Hkv]
    centre: jax.Array  # [b, Hkv, d]

    @property
    def eta_max(self) -> jax.Array:
        """Block maxima of eta: `[b, Hkv, 1, NB]`."""
        return self.eta.max(-1)[:, :, None]

    def depth(self, promoted: bool) -> int:
        """Length of the longest chain of additions in an attempt, with promoted values or without."""
        n_blocks, size = self.nu.shape[-2:]
        return accumulation_depth(n_blocks * size, self.window_live.shape[-1], n_blocks, size, promoted)


@struct.dataclass
class Attempt:
    """An output and its bound, before the ladder. Leaves `[b, Hkv, G]` unless noted."""

    out: jax.Array  # [b, Hkv, G, d]
    p: jax.Array  # [b, Hkv, G, NB, B]
    mass: jax.Array  # [b, Hkv, G, NB]
    sums: Sums
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
    """Outcomes that depend on promotion: `[b, Hkv, G]` bool, and the blocks read `[b, Hkv, NB]`."""

    ranking: jax.Array
    boundary: jax.Array
    canary: jax.Array
    pages: jax.Array


def build(q: jax.Array, cache: TieredKVCache) -> Problem:
    """Score tier 1 and the windows. `q`: `[b, Hkv, G, d]` float32."""
    b, n_heads, _, d = q.shape
    n_blocks, size = cache.n_blocks, cache.block_size
    active, window_live = _visible(cache)  # [b, NB], [b, Nw]
    here = active[:, None, :, None]

    # where, not a product: a block that is not read may hold anything.
    kappa, eta, nu = (
        jnp.where(here, x.astype(jnp.float32), 0.0) for x in (cache.notes.kappa, cache.notes.eta, cache.notes.nu)
    )
    k_hat = jnp.where(here[..., None], cache.codec.decode_keys(cache.codes, cache.centres), 0.0)
    v_hat = jnp.where(here[..., None], cache.codec.decode_values(cache.codes, cache.centres), 0.0)
    scores = num.dot_scores(q, k_hat.reshape(b, n_heads, n_blocks * size, d))
    scores = jnp.where(active[:, None, None, :, None], scores.reshape(*q.shape[:3], n_blocks, size), -jnp.inf)
    # Barriers here and below: every use of a score or of a decoded value is of the same float32 number.
    scores, v_hat = lax.optimization_barrier((scores, v_hat))

    shown = window_live[:, None, :, None]
    window_keys = jnp.where(shown, jnp.concatenate([cache.sink_keys, cache.ring_keys], 2).astype(jnp.float32), 0.0)
    window_values = jnp.where(
        shown, jnp.concatenate([cache.sink_values, cache.ring_values], 2).astype(jnp.float32), 0.0
    )
    window_scores = jnp.where(window_live[:, None, None], num.dot_scores(q, window_keys), -jnp.inf)
    window_scores = lax.optimization_barrier(window_scores)
    window_nu = jnp.where(
        window_live[:, None], num.norm_up(window_values - cache.centres.values[:, :, None]) * num.NORM_SLACK, 0.0
    )

    k_norm = jnp.where(active[:, None], cache.notes.k_norm.astype(jnp.float32), 0.0).max(-1)
    k_norm = jnp.maximum(k_norm, num.norm_up(window_keys).max(-1))
    delta = score_delta(q, cache.codec, cache.codes, kappa)
    shown_blocks = active[:, None, None]
    return Problem(
        q=q,
        scores=scores,
        delta=jnp.where(shown_blocks[..., None], delta, 0.0),
        delta_paper=jnp.where(shown_blocks, paper_delta(q, cache.codec, cache.codes, delta), 0.0),
        eps=arithmetic.score_rounding(q, k_norm),
        v_hat=v_hat.reshape(b, n_heads, n_blocks * size, d),
        eta=eta,
        nu=nu,
        active=shown_blocks,
        window_scores=window_scores,
        window_values=window_values,
        window_nu=window_nu,
        window_live=window_live,
        nu_max=jnp.maximum(nu.max((-2, -1)), window_nu.max(-1)),
        centre=cache.centres.values,
    )


def _visible(cache: TieredKVCache) -> tuple[jax.Array, jax.Array]:
    """Which blocks are read from tier 1 and which window tokens hold: `[b, NB]`, `[b, S + R*B]` bool.

    Every token of the sequence is in exactly one of tier 1, sink and ring.
    """
    size, length = cache.block_size, cache.length[:, None]
    last = (length - 1) // size
    first_in_ring = last - cache.ring_blocks + 1
    n_sink = cache.sink_keys.shape[-2]
    block = jnp.arange(cache.n_blocks)
    active = (block >= n_sink // size) & (block < first_in_ring)

    token = jnp.arange(n_sink)
    sink = (token < length) & (token // size < first_in_ring)
    slot = jnp.arange(cache.ring_blocks * size)
    held = ring_block_index(cache.length, cache.ring_blocks, size)[:, slot // size]
    ring = (held >= 0) & (held * size + slot % size < length)
    return active, jnp.concatenate([sink, ring], -1)


def weights(problem: Problem, scores: jax.Array) -> Weights:
    """Softmax numerators for `scores` (tier 1, possibly rescored) and the windows."""
    return softmax_weights(scores, problem.window_scores)


def quantized(problem: Problem, policy: Policy) -> Attempt:
    """The attempt with nothing promoted."""
    return evaluate(problem, policy, weights(problem, problem.scores))


def unchecked(problem: Problem) -> jax.Array:
    """The output of `quantized` alone (the bound is dead code to the compiler)."""
    w = weights(problem, problem.scores)
    return attend_reference(
        w, problem.delta, problem.eta[:, :, None], problem.nu, problem.window_nu, problem.v_hat,
        problem.window_values,
    ).out  # fmt: skip


def evaluate(
    problem: Problem,
    policy: Policy,
    w: Weights,
    plan: Plan | None = None,
    promoted_values: jax.Array | None = None,
) -> Attempt:
    """Attend with weights `w` and bound the result.

    `plan` says which keys `w` was computed with and which values `promoted_values`
    (`[b, Hkv, G, d]`, sum of w v) accounts for; None means tier 1 throughout.
    """
    delta, delta_paper = problem.delta, problem.delta_paper
    eta = problem.eta[:, :, None]
    quantized_values = jnp.broadcast_to(problem.active, delta_paper.shape)
    left = quantized_values
    if plan is not None:
        delta = jnp.where(plan.keys[..., None], 0.0, delta)
        delta_paper = jnp.where(plan.keys, 0.0, delta_paper)
        eta = jnp.where(plan.values[..., None], 0.0, eta)
        quantized_values = quantized_values & ~plan.values
        left = left & ~plan.keys
    done = attend_reference(
        w, delta, eta, problem.nu, problem.window_nu, problem.v_hat, problem.window_values,
        None if plan is None else quantized_values, promoted_values,
    )  # fmt: skip
    sums, mass = done.sums, done.p.sum(-1)

    depth = problem.depth(promoted=promoted_values is not None)
    accumulated = arithmetic.accumulation(sums, num.norm_up(problem.centre), depth)
    e_val = centred.e_val(sums)
    # Twice: `out` as returned and `out` as the compiler may recompute it for this line are both within
    # `accumulated` of the real O^, and need not be equal.
    from_centre = num.norm_up(problem.centre[:, :, None] - done.out) + 2 * accumulated
    offset = from_centre + e_val
    delta_max = delta.max((-2, -1))
    e_key = jnp.where(delta_max < num.MAX_DELTA, centred.e_key(sums, offset), jnp.inf)
    n_tokens = delta.shape[-2] * delta.shape[-1] + problem.window_live.shape[-1]
    e_arith = arithmetic.e_arith(
        sums, e_key, offset, problem.nu_max[..., None], delta_max, problem.eps, accumulated, n_tokens
    )
    # Nothing can be further from O* than the values reach: O* lies within nu_max of the centre.
    trivial = problem.nu_max[..., None] + from_centre
    total = e_key + e_val + e_arith
    total = jnp.minimum(*(jnp.where(jnp.isnan(x), jnp.inf, x) for x in (total, trivial)))
    return Attempt(
        out=done.out,
        p=done.p,
        mass=mass,
        sums=sums,
        offset=offset,
        e_key=e_key,
        e_val=e_val,
        e_arith=e_arith,
        e_total=total * arithmetic.inflate(depth) + num.ABSOLUTE_FLOOR,
        e_key_paper=paper.e_key_paper(
            problem.nu_max[..., None], delta_paper.max(-1), jnp.where(left, mass, 0.0).sum(-1)
        ),
        e_val_paper=paper.e_val_paper(mass, problem.eta_max, quantized_values),
        delta_max=delta_max,
    )


def block_terms(problem: Problem, attempt: Attempt) -> tuple[jax.Array, jax.Array]:
    """Contribution of each block to E_key and E_val of an attempt with nothing promoted."""
    return centred.block_terms(
        attempt.p, problem.delta, problem.nu, problem.eta[:, :, None], attempt.sums, attempt.offset
    )
