"""How an annotation is stored: a bfloat16 a token, or a byte a token beside a bfloat16 peak a block.

Both round up. A byte is a share of the block's peak in 255ths: it costs at most 0.4% of the peak and needs no
assumption about the range of what it holds.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from pallas_kernels import numerics as num

NoteFormat = Literal["bfloat16", "byte"]
STEPS = 255


@struct.dataclass
class Shares:
    """Non-negative numbers `peak * share / 255` over the last axis of a block."""

    peak: jax.Array  # [...] bfloat16
    share: jax.Array  # [..., B] uint8


Note = jax.Array | Shares
"""An annotation as stored: `[..., B]` bfloat16, or `Shares`."""


def store(x: jax.Array, form: NoteFormat) -> Note:
    """Round `x` (`[..., B]` float32, >= 0, or inf/NaN) up. One number of a block that is not finite makes all of its
    bytes infinite."""
    if form == "bfloat16":
        return num.round_up_bf16(x)
    peak = num.round_up_bf16(x.max(-1))
    wide = peak.astype(jnp.float32)[..., None]
    # Some compilers divide by multiplying with the reciprocal, which must be a normal number.
    unit = jnp.where(wide > 2.0**100, 2.0**-60, jnp.where(wide < 2.0**-100, 2.0**60, 1.0))
    ratio = (x * unit) / jnp.where((wide > 0) & jnp.isfinite(wide), wide * unit, 1.0)
    share = jnp.clip(jnp.ceil(ratio * (STEPS * (1 + 2.0**-20))), 0, STEPS)
    share = jnp.where(x > 0, jnp.maximum(share, 1), 0)  # a ratio may be flushed to zero, a residual may not
    return Shares(peak=peak, share=share.astype(jnp.uint8))


def read(note: Note) -> jax.Array:
    """What is stored, `[..., B]` float32: never below what `store` was given."""
    if not isinstance(note, Shares):
        return note.astype(jnp.float32)
    peak = note.peak.astype(jnp.float32)[..., None]
    value = peak * (note.share.astype(jnp.float32) * ((1 + 2.0**-20) / STEPS))
    return jnp.where(jnp.isfinite(peak), value, peak)


def block_peak(note: Note) -> jax.Array:
    """Largest annotation of each block (and level), `[...]` float32."""
    return (note.peak if isinstance(note, Shares) else note.max(-1)).astype(jnp.float32)


def nbytes(size: int, form: NoteFormat) -> int:
    """Bytes of the annotation of a block of `size` tokens."""
    return 2 * size if form == "bfloat16" else size + 2
