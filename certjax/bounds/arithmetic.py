"""`E_arith`: what float32 adds to the attend pass, as the XLA path is written.

Derivation: docs/bounds.md, section 5. Scores as computed are the exact scores of slightly different logits,
so their rounding `eps` enters like Delta; the accumulation of values is a relative error of the sum.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import numerics as num
from pallas_kernels.attend.reference import Sums


def score_rounding(q: jax.Array, k_norm_max: jax.Array) -> jax.Array:
    """`eps`: bound on the error of every computed score and of the exponential taken of it.

    `q`: [b, Hkv, G, d], `k_norm_max`: [b, Hkv]; returns `[b, Hkv, G]`.
    """
    return num.score_error(q.shape[-1], num.norm_up(q), k_norm_max[..., None]) + num.EXP_RELATIVE_ERROR


def accumulation(sums: Sums, centre_norm: jax.Array, depth: int) -> jax.Array:
    """Error of `sum w v^ / sum w` as accumulated: relative to `sum p' ||v^_t|| <= nu_mean + ||c|| + E_val`."""
    relative = 2 * num.gamma(depth) + 4 * num.U
    return relative * (sums.nu_mean + centre_norm[..., None] + sums.e_val)


def e_arith(
    sums: Sums,
    e_key: jax.Array,
    offset: jax.Array,
    nu_max: jax.Array,
    delta_max: jax.Array,
    eps: jax.Array,
    accumulated: jax.Array,
    n_tokens: int,
) -> jax.Array:
    """All that rounding adds to `e_key + e_val`.

    With every Delta_t raised by eps, `e^{Delta+eps} - 1 = e^eps (e^Delta - 1) + (e^eps - 1)` and
    `L- -> e^-eps L-`; the difference to `e_key`, the flushed weights and the accumulation are added up.
    """
    grow = jnp.exp(eps)
    widened = (grow * grow - 1) * e_key + grow * jnp.expm1(eps) * (sums.nu_mean + offset) / sums.l_minus
    flushed = n_tokens * num.UNDERFLOW * jnp.exp(delta_max) * grow * grow / sums.l_minus * (nu_max + offset)
    return jnp.where(eps < num.MAX_DELTA, widened + flushed + accumulated, jnp.inf)


def inflate(depth: int) -> float:
    """Factor that covers the evaluation of the bound itself in float32 (sums of positive terms)."""
    return 1 + 8 * num.gamma(depth) + 2.0**-14
