"""Twin of `project/triton.py`: the output projection, and the same of what has taken its operand's place."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def project(x: jax.Array, w: jax.Array, layer: jax.Array) -> jax.Array:
    """`[1, b, D]` float32: here of one share."""
    return jnp.dot(x.astype(jnp.bfloat16), w[layer], preferred_element_type=jnp.float32)[None]


def project_again(
    sums: jax.Array, x: jax.Array, w: jax.Array, bias: jax.Array | None, layer: jax.Array, revised: jax.Array
) -> jax.Array:
    """`[b, D]` bfloat16, of the sums of `x` as it was, or of `x` where anything was revised."""
    y = jnp.where((revised > 0).any(), project(x, w, layer), sums).sum(0).astype(jnp.bfloat16)
    return y if bias is None else y + bias[layer]
