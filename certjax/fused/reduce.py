"""Several reductions in one kernel."""

from __future__ import annotations

import operator

import jax
import jax.numpy as jnp
from jax import lax

SUM, MAX = (0.0, operator.add), (-jnp.inf, jnp.maximum)


def together(axis: int, *terms: tuple[jax.Array, tuple]) -> list[jax.Array]:
    """Reduce `(array, SUM or MAX)` pairs of one shape over `axis`, as one operation: XLA makes one kernel of it."""
    arrays = [x.astype(jnp.float32) for x, _ in terms]
    shape = jnp.broadcast_shapes(*(x.shape for x in arrays))
    arrays = [jnp.broadcast_to(x, shape) for x in arrays]
    starts = tuple(jnp.float32(kind[0]) for _, kind in terms)

    def combine(a, b):
        return tuple(kind[1](x, y) for x, y, (_, kind) in zip(a, b, terms, strict=True))

    return lax.reduce(tuple(arrays), starts, combine, (axis % len(shape),))


def sums(axis: int, *arrays: jax.Array) -> list[jax.Array]:
    """Sums of arrays of one shape over `axis`, in one kernel."""
    return together(axis, *((x, SUM) for x in arrays))
