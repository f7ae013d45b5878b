"""One ordinary problem: Gaussian keys with a few strong channels, several lengths. Shared by the tests."""

from __future__ import annotations

import copy
import functools

import jax
import jax.numpy as jnp
import pytest

from certjax import Policy, TieredKVCache, certified_attention
from certjax.codecs import REGISTRY

B, H, G, N, D = 2, 2, 3, 512, 32
LENGTHS = (512, 301)

RARE = ("int8_fp16", "int8_int8", "kivi_int4")
CODECS = [pytest.param(name, marks=pytest.mark.long if name in RARE else ()) for name in sorted(REGISTRY)]
"""Every codec by name; those that are another one with other widths only in long runs."""


@functools.cache
def originals(dtype=jnp.float16, query_scale: float = 1.0):
    """`q` [B, H*G, D] float32, keys and values [B, H, N, D], lengths [B]."""
    a, b, c, d = jax.random.split(jax.random.key(7), 4)
    strong = jnp.exp(jax.random.normal(d, (D,)))
    keys = (jax.random.normal(a, (B, H, N, D)) * strong).astype(dtype)
    values = jax.random.normal(b, (B, H, N, D)).astype(dtype)
    return jax.random.normal(c, (B, H * G, D)) * query_scale, keys, values, jnp.asarray(LENGTHS)


STORED = (
    "codec", "block_size", "group_size", "key_metadata", "key_planes", "value_planes", "refine", "rotate", "fp8_scale",
    "annotations", "spectral", "centre", "sink_tokens", "recent_tokens", "tier2",
)  # fmt: skip
"""What of a policy a cache depends on."""


def build(keys, values, lengths, policy: Policy) -> TieredKVCache:
    """A cache of `lengths`. Policies that store alike share one program."""
    return _build(keys, values, lengths, Policy.observe(**{name: getattr(policy, name) for name in STORED}))


@functools.partial(jax.jit, static_argnames="policy")
def _build(keys, values, lengths, policy: Policy) -> TieredKVCache:
    return TieredKVCache.from_prefill(keys, values, policy, lengths=lengths, capacity=keys.shape[-2])


def cache(policy: Policy, dtype=jnp.float16) -> TieredKVCache:
    _, keys, values, lengths = originals(dtype)
    return build(keys, values, lengths, policy)


certify = jax.jit(certified_attention, static_argnames="policy")


@functools.partial(jax.jit, static_argnames="policy")
def certify_at(tolerance, q, cache: TieredKVCache, policy: Policy):
    """`certify` with the policy's tolerance as an argument of the program: a sweep over tolerances compiles once."""
    policy = copy.copy(policy)
    object.__setattr__(policy, "tolerance", tolerance)
    return certified_attention(q, cache, policy)
