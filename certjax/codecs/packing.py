"""Several codes to a byte."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def pack(codes: jax.Array, width: int) -> jax.Array:
    """`8/width` codes a byte: [..., d] int32 -> [..., d width/8] uint8. Channel c is in byte c mod (d width/8)."""
    slots = codes.reshape(*codes.shape[:-1], 8 // width, -1)
    return (slots << _shifts(width)).sum(-2).astype(jnp.uint8)


def unpack(packed: jax.Array, width: int) -> jax.Array:
    """The inverse of `pack`: int32 `[..., d]`."""
    slots = (packed[..., None, :].astype(jnp.int32) >> _shifts(width)) & (2**width - 1)
    return slots.reshape(*packed.shape[:-1], -1)


def to_signed(packed: jax.Array, width: int) -> jax.Array:
    """The top bit of every code flipped, as int8: each field, read as a two's complement number, is its code less half
    the range. That is what matrix units multiply."""
    return lax.bitcast_convert_type(packed ^ jnp.uint8(_top_bits(width)), jnp.int8)


def from_signed(packed: jax.Array, width: int) -> jax.Array:
    """The inverse of `to_signed`: uint8."""
    return lax.bitcast_convert_type(packed, jnp.uint8) ^ jnp.uint8(_top_bits(width))


def _top_bits(width: int) -> int:
    """The byte that has the top bit of each field set."""
    return sum(1 << i for i in range(width - 1, 8, width))


def _shifts(width: int) -> jax.Array:
    return jnp.arange(8 // width, dtype=jnp.int32)[:, None] * width
