"""An order of things that do not depend on each other."""

from __future__ import annotations

import jax


def not_before(x: jax.Array, other: jax.Array) -> jax.Array:
    """`x`, of integers, as something that is computed from `other`, a number of 0 or more, or NaN: XLA cannot know that
    it adds nothing. What takes it begins when `other` is there, and whatever was read to find that has been read."""
    return x + (other < 0).astype(x.dtype)
