"""A token of each sequence, stored in the windows and in tier 2 of a `TieredKVCache`, without being counted.

`at`: `(layer,)` of a stacked cache, or `()`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from certjax import host
from pallas_kernels import numerics as num

if TYPE_CHECKING:
    from certjax.cache import TieredKVCache


def write_row(cache: TieredKVCache, row: int, k: jax.Array, v: jax.Array, at: tuple) -> TieredKVCache:
    """The token `k`, `v` `[Hkv, d]` of one sequence."""
    size, pos = cache.block_size, cache.length[row]
    room = pos < cache.capacity
    offset, block = pos % size, pos // size
    slot = block % cache.ring_blocks * size
    fresh = (jnp.arange(size) == offset)[None, :, None]
    new = {}

    def window_block(ring, token):  # the block being filled, with the token in it: [Hkv, B, d]
        old = _take(ring, (*at, row), 1, slot, size)
        # Opening a block clears what the ring held there, so that the array depends on the tokens only.
        kept = jnp.where(offset == 0, jnp.zeros_like(old), old)
        return jnp.where(room, jnp.where(fresh, num.cast(token[:, None], ring.dtype), kept), old)

    k_block, v_block = window_block(cache.ring_keys, k), window_block(cache.ring_values, v)
    new["ring_keys"] = _put(cache.ring_keys, k_block, (*at, row), 1, slot)
    new["ring_values"] = _put(cache.ring_values, v_block, (*at, row), 1, slot)

    if cache.sink_keys.shape[-2]:
        for name, token in (("sink_keys", k), ("sink_values", v)):
            sink = getattr(cache, name)
            there = jnp.minimum(pos, sink.shape[-2] - 1)
            old = _take(sink, (*at, row), 1, there, 1)
            token = jnp.where(pos < sink.shape[-2], num.cast(token[:, None], sink.dtype), old)
            new[name] = _put(sink, token, (*at, row), 1, there)

    return write_originals_of_row(cache.replace(**new), row, pos, k, v, at)


def write_originals_of_row(
    cache: TieredKVCache, row: int, pos: jax.Array, k: jax.Array, v: jax.Array, at: tuple
) -> TieredKVCache:
    """The part of `write_row` that concerns tier 2."""
    if cache.host_keys is None:
        return cache
    there, new = jnp.minimum(pos, cache.capacity - 1), {}
    for name, token in (("host_keys", k), ("host_values", v)):
        tier2 = getattr(cache, name)
        token = num.cast(token, tier2.dtype)[:, None]
        if host.in_host_memory(tier2):
            token = jax.device_put(token, host.Space.Host)
        new[name] = _put(tier2, token, (*at, row), 1, there)
    return cache.replace(**new)


def write_rows(cache: TieredKVCache, k: jax.Array, v: jax.Array, at: tuple) -> TieredKVCache:
    """`write_row` of all sequences at once, `[b, Hkv, d]`."""
    size, pos = cache.block_size, cache.length[:, None, None]
    batch, n_heads, n_ring, _ = cache.ring_keys.shape[-4:]
    # Every axis but the last is indexed, so that XLA has no reason to transpose the array.
    at = (*at, jnp.arange(batch)[:, None, None], jnp.arange(n_heads)[:, None])

    def put(x, fresh, place):  # [b, Hkv, n, d] at places [b, 1, n], dropped beyond the end
        return x.at[(*at, place)].set(fresh, mode="drop", unique_indices=True)

    def token_of(x, token):  # [b, Hkv, 1, d]
        return num.cast(token, x.dtype)[:, :, None]

    slots = pos // size % cache.ring_blocks * size + jnp.arange(size)
    offset, there = pos[..., None] % size, jnp.where(pos < cache.capacity, slots, n_ring + slots)

    def window_block(ring, token):  # as for a row: [b, Hkv, B, d]
        old = ring.at[(*at, slots)].get(mode="promise_in_bounds")
        kept = jnp.where(offset == 0, jnp.zeros_like(old), old)
        return jnp.where(jnp.arange(size)[:, None] == offset, token_of(ring, token), kept)

    new = {}
    for kind, token in (("keys", k), ("values", v)):
        ring, sink, tier2 = (getattr(cache, f"{name}_{kind}") for name in ("ring", "sink", "host"))
        new[f"ring_{kind}"] = put(ring, window_block(ring, token), there)
        if sink.shape[-2]:
            new[f"sink_{kind}"] = put(sink, token_of(sink, token), pos)
        if tier2 is not None:
            new[f"host_{kind}"] = put(tier2, token_of(tier2, token), jnp.minimum(pos, cache.capacity - 1))
    return cache.replace(**new)


def _take(x: jax.Array, lead: tuple, axis: int, start, size: int) -> jax.Array:
    """`x[*lead, ..., start:start+size, ...]` where `axis` counts from the end of `lead`."""
    rest = x.ndim - len(lead)
    starts = (*lead, *[start if i == axis else 0 for i in range(rest)])
    sizes = (*[1] * len(lead), *[size if i == axis else x.shape[len(lead) + i] for i in range(rest)])
    return lax.dynamic_slice(x, starts, sizes).reshape(sizes[len(lead) :])


def _put(x: jax.Array, piece: jax.Array, lead: tuple, axis: int, start) -> jax.Array:
    """The inverse of `_take`: `x` with `piece` stored there."""
    rest = x.ndim - len(lead)
    starts = (*lead, *[start if i == axis else 0 for i in range(rest)])
    return lax.dynamic_update_slice(x, piece.reshape(*[1] * len(lead), *piece.shape), starts)
