"""Which tiles a program of the scan reads, where some programs have something else to do, too."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

AHEAD, MOST_AHEAD = 11, 20
"""Tiles that programs with nothing else to do are ahead by: what a program takes that refines one tile or reads some
pieces from the host (some 24 us beside others of the scan, the first time through that code); one more for every
further tile, up to the second."""


def deal(
    program: jax.Array, programs: int, tiles: jax.Array, refining: jax.Array, reading: jax.Array, listed: jax.Array
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """How many of `tiles` a program reads, and which its `i`-th is.

    The first `refining` of the programs share `listed` tiles to refine, the last `reading` have something to read from
    the host; tiles are first dealt to the others alone, for some rounds, and then to all, those others first. At most
    MOST_AHEAD more than an even share, rounded up.
    """
    free = jnp.maximum(programs - refining - reading, 0)
    rank = program - refining  # among those with nothing else to do
    each = _up(listed, jnp.maximum(refining, 1))
    ahead = jnp.where(refining + reading > 0, jnp.minimum(AHEAD + each, MOST_AHEAD), 0)
    is_free = (rank >= 0) & (rank < free)
    place = jnp.where(is_free, rank, jnp.where(program < refining, free + program, program))
    own, shared = jnp.where(is_free, ahead, 0), ahead * free
    count = jnp.minimum(own, _up(tiles - rank, jnp.maximum(free, 1))) + _up(tiles - shared - place, programs)

    def tile_at(i):
        return jnp.where(i < own, rank + i * free, shared + place + (i - own) * programs)

    return count, tile_at


def _up(x, by):
    """`x / by`, rounded up; 0 for what is below it."""
    return lax.div(jnp.maximum(x, 0) + by - 1, by)
