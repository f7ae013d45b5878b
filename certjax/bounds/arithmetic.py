"""`E_arith`: what float32 adds to the attend pass, as the XLA path is written.

Derivation: docs/bounds.md, section 5. Scores as computed are the exact scores of slightly different logits,
so their rounding `eps` enters like Delta; the accumulation of values is a relative error of the sum.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import numerics as num
from pallas_kernels.attend.reference import Sums


def score_rounding(q: jax.Array, k_norm: jax.Array, turned: float) -> jax.Array:
    """`eps`: bound on the error of every computed score and of the exponential taken of it.

    `q`: [b, Hkv, G, d]; `k_norm`: [b, Hkv], largest `||k||`, or `||y|| + ||c||` for scores computed as
    `(R q).y + q.c`; `turned`: what that form adds relatively, 0 where there is none. Returns `[b, Hkv, G]`.
    """
    return num.score_error(q.shape[-1], num.norm_up(q), k_norm[..., None], turned) + num.EXP_RELATIVE_ERROR


def accumulation(sums: Sums, centre_norm: jax.Array, depth_error: jax.Array | float, turned: float) -> jax.Array:
    """Error of `sum w v^ / sum w` as accumulated: relative to `sum p' ||v^_t|| <= nu_mean + ||c|| + sum p' eta`.

    `depth_error`: `gamma(D)` of the chain of additions, `[b, Hkv, 1]` or a number; `turned`: the relative error of
    turning the sum out of the codec's basis and adding the centre.
    """
    relative = 2 * depth_error + 4 * num.U + turned
    return relative * (sums.nu_mean + centre_norm[..., None] + sums.e_val)


def e_arith(
    sums: Sums,
    e_key_linear: jax.Array,
    offset: jax.Array,
    reach: jax.Array,
    delta_max: jax.Array,
    eps: jax.Array,
    accumulated: jax.Array,
    n_tokens: int,
) -> jax.Array:
    """All that rounding adds to `e_key + e_val`. `e_key_linear` is E_key with every token on its own, `reach` the
    largest nu plus the largest eta.

    With every Delta_t raised by eps, `e^{Delta+eps} - 1 = e^eps (e^Delta - 1) + (e^eps - 1)` and
    `L- -> e^-eps L-`; the difference to E_key, the flushed weights and the accumulation are added up.
    """
    grow = jnp.exp(eps)
    widened = (grow * grow - 1) * e_key_linear + grow * jnp.expm1(eps) * (sums.nu_mean + offset) / sums.l_minus
    flushed = n_tokens * num.UNDERFLOW * jnp.exp(delta_max) * grow * grow / sums.l_minus * (reach + offset)
    return jnp.where(eps < num.MAX_DELTA, widened + flushed + accumulated, jnp.inf)


def inflate(depth: int) -> float:
    """Factor that covers the evaluation of the bound itself in float32 (sums of positive terms)."""
    return 1 + 8 * num.gamma(depth) + 2.0**-14
