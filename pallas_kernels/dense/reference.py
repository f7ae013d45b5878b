"""Dense attention of one decode query over the originals: the baseline, and the ladder's last rung.

The dense mode and the fallback call this one function, so that a head that fell back returns what the
dense mode would have returned, bit for bit where the back end is deterministic.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import numerics as num

Originals = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""`(row, kv_head) -> (keys, values)`, each `[N, d]`, on the device."""


def dense_group(
    q: jax.Array,  # [G, d] float32
    keys: jax.Array,  # [N, d] originals
    values: jax.Array,  # [N, d] originals
    length: jax.Array,  # [] int32
) -> jax.Array:  # [G, d] float32
    """`softmax(q.k/sqrt(d)) v` over the first `length` tokens, for the G query heads of one KV head."""
    live = jnp.arange(keys.shape[0]) < length
    s = jnp.where(live, num.dot_scores(q, keys.astype(jnp.float32)), -jnp.inf)
    w = jnp.exp(s - s.max(-1, keepdims=True))
    # where, not a product with the mask: what lies beyond `length` may be anything, NaN included.
    v = jnp.where(live[:, None], values.astype(jnp.float32), 0.0)
    # The weights are a buffer of their own in every program that calls this, so that XLA has no other
    # fusion to choose and the dense mode and the fallback stay equal to the bit.
    w = lax.optimization_barrier(w)
    return num.weighted_sum(w, v) / num.sum_tokens(w)[:, None]


def dense_error(
    q: jax.Array,  # [G, d] float32
    keys: jax.Array,  # [N, d]
    values: jax.Array,  # [N, d]
    length: jax.Array,  # [] int32
    out: jax.Array,  # [G, d] what dense_group returned
) -> jax.Array:  # [G] float32
    """Bound on `||dense_group(...) - O*||`: its arithmetic, nothing else (docs/bounds.md, section 6).

    Rests on the originals alone, never on tier 1 annotations, so that it holds after rung 4 too.
    """
    n, d = keys.shape
    live = jnp.arange(n) < length
    k_max = jnp.where(live, num.norm_up(keys.astype(jnp.float32)), 0.0).max()
    v_max = jnp.where(live, num.norm_up(values.astype(jnp.float32)), 0.0).max()
    eps = num.score_error(d, num.norm_up(q), k_max) + num.EXP_RELATIVE_ERROR
    accumulated = (2 * num.gamma(num.sum_depth(n)) + 4 * num.U) * v_max
    radius = v_max + num.norm_up(out) + accumulated
    e_eps = jnp.exp(eps)
    bound = (e_eps * jnp.expm1(eps) + n * num.UNDERFLOW) * radius + accumulated
    # Both vectors lie within v_max (up to rounding) of the origin: no bound need exceed this.
    bound = jnp.minimum(jnp.where(eps < num.MAX_DELTA, bound, jnp.inf), v_max + num.norm_up(out))
    return jnp.where(jnp.isnan(bound), jnp.inf, bound) * (1 + 2.0**-12) + num.ABSOLUTE_FLOOR


def dense_heads(
    q: jax.Array,  # [b, Hkv, G, d] float32
    originals: Originals,
    length: jax.Array,  # [b] int32
    wanted: jax.Array,  # [b, Hkv] bool
    out: jax.Array,  # [b, Hkv, G, d]
    error: jax.Array | None = None,  # [b, Hkv, G]
) -> tuple[jax.Array, jax.Array | None]:
    """Replace `out`, and `error` if given, by dense attention and its `dense_error` for the wanted KV heads.

    A `lax.cond` per head inside a loop, never under `vmap` (which would run both branches): a head that is
    not wanted reads nothing and computes nothing.
    """
    n_heads = q.shape[1]

    def visit(i, carry):
        row, head = i // n_heads, i % n_heads

        def attend(carry):
            out, error = carry
            # Barriers: the head's attention is compiled alone, the same in every program that calls it.
            keys, values = lax.optimization_barrier(originals(row, head))
            fresh = lax.optimization_barrier(dense_group(q[row, head], keys, values, length[row]))
            out = lax.dynamic_update_slice(out, fresh[None, None], (row, head, 0, 0))
            if error is None:
                return out, None
            bound = dense_error(q[row, head], keys, values, length[row], fresh)
            return out, lax.dynamic_update_slice(error, bound[None, None], (row, head, 0))

        return lax.cond(wanted[row, head], attend, lambda carry: carry, carry)

    return lax.fori_loop(0, q.shape[0] * n_heads, visit, (out, error))


def dense_heads_together(
    q: jax.Array,  # [b, Hkv, G, d] float32
    keys: jax.Array,  # [b, Hkv, N, d] originals on the device
    values: jax.Array,  # [b, Hkv, N, d]
    length: jax.Array,  # [b] int32
    wanted: jax.Array,  # [b, Hkv] bool
    out: jax.Array,  # [b, Hkv, G, d]
    error: jax.Array | None = None,  # [b, Hkv, G]
) -> tuple[jax.Array, jax.Array | None]:
    """`dense_heads` of originals on the device: all heads are computed at once, the wanted ones taken."""
    # A barrier: what is bounded is what is returned.
    fresh = lax.optimization_barrier(_over_heads(dense_group, q, keys, values, length))
    out = jnp.where(wanted[..., None, None], fresh, out)
    if error is None:
        return out, None
    return out, jnp.where(wanted[..., None], _over_heads(dense_error, q, keys, values, length, fresh), error)


def _over_heads(f, q, keys, values, length, *rest):
    """`f` of every row and KV head: leaves `[b, Hkv, ...]`, but `length` `[b]`."""
    rest_axes = [0] * len(rest)
    return jax.vmap(jax.vmap(f, in_axes=(0, 0, 0, None, *rest_axes)))(q, keys, values, length, *rest)


def dense_reference(
    q: jax.Array,  # [b, Hkv, G, d] float32
    keys: jax.Array,  # [L, b, Hkv, N, d]
    values: jax.Array,  # [L, b, Hkv, N, d]
    length: jax.Array,  # [b] int32
    layer: jax.Array | int = 0,  # [] int32
) -> jax.Array:  # [b, Hkv, G, d]
    """Dense attention of every head of one layer over originals on the device: the dense mode.

    On a CPU the heads run one by one through `dense_heads`, which makes the mode and the fallback equal to
    the bit; elsewhere they run together, and the two agree within `dense_error`.
    """
    n, d = keys.shape[-2:]

    def one_by_one(q, keys, values, length):
        def originals(row, head):
            where = (layer, row, head, 0, 0)
            return tuple(lax.dynamic_slice(x, where, (1, 1, 1, n, d)).reshape(n, d) for x in (keys, values))

        wanted = jnp.ones(q.shape[:2], bool)
        return dense_heads(q, originals, length, wanted, jnp.zeros_like(q))[0]

    def together(q, keys, values, length):
        keys, values = (lax.dynamic_index_in_dim(x, layer, 0, keepdims=False) for x in (keys, values))
        return _over_heads(dense_group, q, keys, values, length)

    return lax.platform_dependent(q, keys, values, length, cpu=one_by_one, default=together)
