"""A step's keys and values into a cache: the windows by one kernel where others attend to them. (A chain of kernels
stores the token in that which makes the queries ready, `pallas_kernels.prepare`.)"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax

from certjax.cache import TieredKVCache
from certjax.fused.dispatch import COMPILED, pick_backend
from certjax.policy import Policy
from pallas_kernels import numerics as num

if TYPE_CHECKING:
    from pallas_kernels.append.triton import Append

WINDOWS = ("ring_keys", "ring_values", "sink_keys", "sink_values")


Token = tuple[jax.Array, jax.Array]
"""Its keys and values, `[b, Hkv, d]`."""


def append(
    cache: TieredKVCache, k: jax.Array, v: jax.Array, layer: jax.Array, policy: Policy, n_query_heads: int
) -> TieredKVCache:
    """As `cache.write(k, v, layer)` before the token was counted. `k`, `v`: [b, Hkv, d]; `layer`: [] int32."""
    backend = pick_backend(policy, cache, n_query_heads)
    if backend not in COMPILED or not by_kernel(cache):
        return cache.replace(length=cache.length - 1).write(k, v, layer).counting()
    from pallas_kernels.append.triton import append_to_windows

    windows = append_to_windows(token_of(cache, k, v), layer.reshape(1))
    return with_windows(cache, windows).write_originals(k, v, layer)


def by_kernel(cache: TieredKVCache) -> bool:
    """Whether kernels can store a token in the windows."""
    return cache.tier2 != "device" and cache.sink_keys.shape[-2] > 0


def token_of(cache: TieredKVCache, k: jax.Array, v: jax.Array) -> Append:
    """What kernels take of the token that was counted last, for the windows of a stacked cache."""
    from pallas_kernels.append.triton import Append

    return Append(
        *(num.cast(x, cache.ring_keys.dtype) for x in (k, v)), cache.length,
        tuple(getattr(cache, name) for name in WINDOWS), size=cache.block_size, capacity=cache.capacity,
    )  # fmt: skip


def with_windows(cache: TieredKVCache, windows: list[jax.Array]) -> TieredKVCache:
    """The cache with these in place of its `WINDOWS`."""
    return cache.replace(**dict(zip(WINDOWS, windows, strict=True)))
