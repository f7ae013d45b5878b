"""The paper's bounds (arXiv:2605.20868), reported beside ours.

They speak of the loss by quantization alone, in real arithmetic. All arrays are `[b, Hkv, G]` but for
block-wise inputs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def e_key_paper(v_max: jax.Array, d_max: jax.Array, tail_mass: jax.Array) -> jax.Array:
    """`E_key = 2 V_max e^{2D} a (e^{2D} - 1)`: `D` the largest Delta_b left, `a` the mass left unpromoted."""
    # Past e^80 the bound says nothing; the clamp keeps 0 * inf out where the tail is empty.
    two_d = jnp.minimum(2 * d_max, 80.0)
    bound = 2 * v_max * jnp.exp(two_d) * tail_mass * jnp.expm1(two_d)
    return jnp.where((2 * d_max <= 80.0) | (tail_mass == 0), bound, jnp.inf)


def e_val_paper(mass: jax.Array, eta_max: jax.Array, quantized: jax.Array) -> jax.Array:
    """`E_val = sum_b rho_b eta_b` over blocks with INT4 values.

    `mass`: rho_b `[b, Hkv, G, NB]`; `eta_max`: eta_b `[b, Hkv, 1, NB]`; `quantized`: bool like `mass`.
    """
    return jnp.where(quantized, mass * eta_max, 0.0).sum(-1)
