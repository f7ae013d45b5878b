"""A step's keys and values into a cache, its windows by one kernel where attention, too, is a chain of kernels."""

from __future__ import annotations

import jax

from certjax.cache import TieredKVCache
from certjax.fused.dispatch import kernels_of, pick_backend
from certjax.policy import Policy
from pallas_kernels import numerics as num

WINDOWS = ("ring_keys", "ring_values", "sink_keys", "sink_values")


Token = tuple[jax.Array, jax.Array]
"""Its keys and values, `[b, Hkv, d]`."""


def append(
    cache: TieredKVCache, k: jax.Array, v: jax.Array, layer: jax.Array, policy: Policy, n_query_heads: int
) -> tuple[TieredKVCache, Token | None]:
    """As `cache.write(k, v, layer)`; and what is left to be written of the originals, where `certified_layer` does that
    beside what it computes. `k`, `v`: [b, Hkv, d]; `layer`: [] int32."""
    backend = pick_backend(policy, cache, n_query_heads)
    chained = backend == "mosaic_gpu" and kernels_of(backend, k.shape[0] * k.shape[1]).chained
    if not chained or cache.tier2 == "device" or not cache.sink_keys.shape[-2]:
        return cache.write(k, v, layer), None
    return in_a_kernel(cache, k, v, layer), (k, v)


def in_a_kernel(cache: TieredKVCache, k: jax.Array, v: jax.Array, layer: jax.Array) -> TieredKVCache:
    """`append` of a stacked cache that has a sink window, without what is left to be written."""
    from pallas_kernels.append.triton import append_to_windows

    tokens = (num.cast(x, cache.ring_keys.dtype) for x in (k, v))
    windows = append_to_windows(
        *tokens, cache.length, layer.reshape(1), tuple(getattr(cache, name) for name in WINDOWS),
        size=cache.block_size, capacity=cache.capacity,
    )  # fmt: skip
    return cache.replace(**dict(zip(WINDOWS, windows, strict=True)))
