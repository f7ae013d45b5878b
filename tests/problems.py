"""One ordinary problem: Gaussian keys with a few strong channels, several lengths. Shared by the tests."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from certjax import Policy, TieredKVCache, certified_attention

B, H, G, N, D = 2, 2, 3, 512, 32
LENGTHS = (512, 301)


@functools.cache
def originals(dtype=jnp.float16, query_scale: float = 1.0):
    """`q` [B, H*G, D] float32, keys and values [B, H, N, D], lengths [B]."""
    a, b, c, d = jax.random.split(jax.random.key(7), 4)
    strong = jnp.exp(jax.random.normal(d, (D,)))
    keys = (jax.random.normal(a, (B, H, N, D)) * strong).astype(dtype)
    values = jax.random.normal(b, (B, H, N, D)).astype(dtype)
    return jax.random.normal(c, (B, H * G, D)) * query_scale, keys, values, jnp.asarray(LENGTHS)


@functools.partial(jax.jit, static_argnames="policy")
def build(keys, values, lengths, policy: Policy) -> TieredKVCache:
    return TieredKVCache.from_prefill(keys, values, policy, lengths=lengths, capacity=keys.shape[-2])


def cache(policy: Policy, dtype=jnp.float16) -> TieredKVCache:
    _, keys, values, lengths = originals(dtype)
    return build(keys, values, lengths, policy)


certify = jax.jit(certified_attention, static_argnames="policy")
