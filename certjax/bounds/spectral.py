"""The spectral form of the bound: residuals of a block taken together, through the norm of their matrix.

Derivation: docs/bounds.md, section 4. Token by token, a sum of residuals is bounded as if all pointed the same way; a
block's spectral norm says how far they do. Per block the smaller of the two bounds counts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import numerics as num


def second_order(delta: jax.Array) -> jax.Array:
    """Upper bound on `e^Delta - 1 - Delta`, free of cancellation: `Delta^2/2 e^(Delta/2)` where Delta is small."""
    small = 0.5 * delta * delta * jnp.exp(0.5 * jnp.minimum(delta, 0.5))
    return jnp.where(delta < 0.5, small, (jnp.expm1(delta) - delta) * (1 + 2.0**-14))


def key_terms(
    p: jax.Array,  # [b, Hkv, G, NB, B] normalised weights
    delta: jax.Array,  # [b, Hkv, G, NB, B]
    x: jax.Array,  # [b, Hkv, G, NB, B] nu_t + h
    coefficient: jax.Array,  # [b, Hkv, G, NB] ||q|| sigma_k / sqrt(d), 0 where keys are exact
) -> jax.Array:  # [b, Hkv, G, NB]
    """Per block `min(sum p (e^D - 1) x, coefficient ||p x|| + sum p (e^D - 1 - D) x)`, both norms over the block."""
    one_by_one = (p * jnp.expm1(delta) * x).sum(-1)
    together = coefficient * _norm(p, x) + (p * second_order(delta) * x).sum(-1)
    return jnp.minimum(one_by_one, together)


def value_terms(
    p: jax.Array,  # [b, Hkv, G, NB, B]
    eta: jax.Array,  # [b, Hkv, G, NB, B]
    sigma: jax.Array,  # [b, Hkv, G, NB], 0 where values are exact
) -> jax.Array:  # [b, Hkv, G, NB]
    """Per block `min(sum p eta, sigma_v ||p||)`."""
    return jnp.minimum((p * eta).sum(-1), sigma * _norm(p, jnp.ones_like(p)))


def _norm(p: jax.Array, x: jax.Array) -> jax.Array:
    """`||(p_t x_t)_t||` over the last axis: in shares of the block's mass, so that no square of a small weight is
    flushed."""
    mass = jnp.maximum(p.sum(-1, keepdims=True), 2.0**-100)  # its reciprocal must be a normal number
    return mass[..., 0] * num.norm_up(p / mass * x)
