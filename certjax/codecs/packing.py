"""Several codes to a byte."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def pack(codes: jax.Array, width: int) -> jax.Array:
    """`8/width` codes a byte: [..., d] int32 -> [..., d width/8] uint8. Channel c is in byte c mod (d width/8)."""
    slots = codes.reshape(*codes.shape[:-1], 8 // width, -1)
    return (slots << _shifts(width)).sum(-2).astype(jnp.uint8)


def unpack(packed: jax.Array, width: int) -> jax.Array:
    """The inverse of `pack`: int32 `[..., d]`."""
    slots = (packed[..., None, :].astype(jnp.int32) >> _shifts(width)) & (2**width - 1)
    return slots.reshape(*packed.shape[:-1], -1)


def _shifts(width: int) -> jax.Array:
    return jnp.arange(8 // width, dtype=jnp.int32)[:, None] * width
