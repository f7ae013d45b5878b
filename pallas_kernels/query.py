"""Queries as the kernels multiply them: 16-bit fixed point in two 8-bit halves, with every factor of a score folded in.

A score is taken in units of log 2 and less a reference `rho` that is chosen before anything is scored, so that the
weights `w_t = 2^(x_t)` of all tiles have one scale and are added up as they come (docs/kernels.md).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from pallas_kernels import numerics as num

LOG2_E = 1.4426950408889634
COLUMNS = 8
"""Query heads of a group, padded: the narrowest operand of a matrix instruction."""

STEPS = 32512
"""Largest fixed-point query: `256 * 127`."""


@struct.dataclass
class Fixed:
    """`scale * (256 high + low)`, and how far it is from the query."""

    high: jax.Array  # [H, COLUMNS, d] int8
    low: jax.Array  # [H, COLUMNS, d] int8
    scale: jax.Array  # [H, COLUMNS] float32
    error: jax.Array  # [H, COLUMNS] float32, ||q - fixed||, rounded up


def fixed_point(q: jax.Array, largest: jax.Array) -> Fixed:
    """`q`: [H, COLUMNS, d] float32, `largest`: [H, COLUMNS] its largest element by size."""
    # No scale is so small that its reciprocal overflows: elements are below 2^-110 then.
    scale = jnp.maximum(largest * ((1 + 2.0**-20) / STEPS), 2.0**-110)
    steps = jnp.clip(jnp.round(q / scale[..., None]), -STEPS, STEPS).astype(jnp.int32)
    high = (steps + 128) >> 8
    # Half a step a channel, and the rounding of the quotient.
    error = scale * (q.shape[-1] ** 0.5 * (0.5 + STEPS * 4 * num.U))
    return Fixed(high.astype(jnp.int8), (steps - 256 * high).astype(jnp.int8), scale, error)


def value(x: Fixed) -> jax.Array:
    """The fixed-point query as float32 `[H, COLUMNS, d]`."""
    return (x.high.astype(jnp.float32) * 256 + x.low.astype(jnp.float32)) * x.scale[..., None]


def bf16_pair(x: Fixed) -> jax.Array:
    """Both halves as bfloat16, exact: [H, 2, COLUMNS, d]."""
    return jnp.stack([x.high, x.low], 1).astype(jnp.bfloat16)


def split_channels(pair: jax.Array) -> jax.Array:
    """[H, 2, COLUMNS, d] -> [H, 4, COLUMNS, d/2]: each half of the query, cut in the middle of its channels."""
    first, second = jnp.split(pair, 2, axis=-1)
    return jnp.stack([first[:, 0], second[:, 0], first[:, 1], second[:, 1]], 1)
