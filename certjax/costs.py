"""What reading costs: bytes of a block at each precision. Selection weighs them, certificates report them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from certjax.cache import TieredKVCache
from certjax.codecs import notes as nt


@dataclasses.dataclass(frozen=True)
class ReadCosts:
    """Bytes of one block of one KV head.

    Attributes
    ----------
    always
        Keys at their coarsest level with the annotations that every step looks at.
    keys
        What each further key level adds, level 0 being 0; last, the original keys.
    values
        What each value level takes, level 0 (the centre) being 0; last, the original values.
    """

    always: int
    keys: tuple[int, ...]
    values: tuple[int, ...]


def read_costs(cache: TieredKVCache) -> ReadCosts:
    """Costs of the blocks of a cache, from its codec and the way its annotations are stored."""
    codec, size, form = cache.codec, cache.block_size, cache.note_form
    key_bytes, value_bytes = codec.key_bytes(size, cache.head_dim), codec.value_bytes(size, cache.head_dim)
    original = size * cache.head_dim * cache.ring_keys.dtype.itemsize
    note = nt.nbytes(size, form)
    # Planning looks at block peaks, which bytes come with; without them it has to read every annotation.
    later = note - 2 if form == "byte" else 0
    levels = codec.key_levels - 1 + codec.value_levels
    spectral = 2 * (codec.key_levels + 1 + codec.value_levels) if cache.spectral else 0
    k_norm = 2
    return ReadCosts(
        always=key_bytes[0] + 2 * note + levels * (note - later) + spectral + k_norm,
        keys=(0, *(n - key_bytes[0] + later for n in key_bytes[1:]), original),
        values=(0, *(n + later for n in value_bytes), original),
    )


def bytes_of(table: tuple[int, ...], level: jax.Array) -> jax.Array:
    """The entry of `table` for every element of an integer array: float32, as sums of bytes may exceed an int32."""
    return sum(jnp.where(level == i, float(n), 0.0) for i, n in enumerate(table))
