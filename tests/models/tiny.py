"""Tiny models and a plain dense attention plug, shared by the tests of this folder."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from certjax.dense_cache import DenseKVCache
from certjax.models.llama.config import LlamaConfig, RopeScaling

GQA = LlamaConfig(
    vocab_size=97, d_model=48, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=8, d_ff=80, rms_eps=1e-5,
    context_length=256, kv_dtype="float32",
)  # fmt: skip

CONFIGS = {
    "gqa": GQA,
    "mha": dataclasses.replace(GQA, n_kv_heads=6),
    "mqa": dataclasses.replace(GQA, n_kv_heads=1),
    "tied": dataclasses.replace(GQA, tie_embeddings=True),
    "wide_heads": dataclasses.replace(GQA, head_dim=16),
    "attention_bias": dataclasses.replace(GQA, attention_bias=True),
    "mlp_bias": dataclasses.replace(GQA, mlp_bias=True),
    # Wavelengths of head dim 16 fall in all three of llama3's bands.
    "llama3_rope": dataclasses.replace(
        GQA, head_dim=16, rope_theta=500000.0, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    ),
    "linear_rope": dataclasses.replace(GQA, rope_scaling=RopeScaling("linear", 4.0)),
}


def tokens(config: LlamaConfig, *shape: int, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), shape, 0, config.vocab_size, jnp.int32)


def empty_cache(config: LlamaConfig, batch: int, max_length: int, fill: float = 0.0) -> DenseKVCache:
    cache = DenseKVCache.empty(config, batch, max_length)
    return cache.replace(keys=cache.keys + fill, values=cache.values + fill)


def dense_attend(q, k, v, cache: DenseKVCache, layer, project):
    """One token per sequence, stored at `length`; softmax over everything stored; the record is `sum(out)`."""
    b, _, n_heads, d = q.shape
    cache = cache.write(k, v, layer, cache.length)
    keys, values = (x[layer].astype(jnp.float32) for x in (cache.keys, cache.values))  # [b, Hkv, N, d]
    seen = (jnp.arange(cache.max_length) <= cache.length[:, None])[:, None, None, :]
    grouped = q[:, 0].astype(jnp.float32).reshape(b, keys.shape[1], -1, d)
    s = jnp.einsum("bhgd,bhnd->bhgn", grouped, keys, precision="highest") * d**-0.5
    w = jax.nn.softmax(jnp.where(seen, s, -jnp.inf), axis=-1)
    values = jnp.where(seen.swapaxes(-1, -2), values, 0.0)
    out = jnp.einsum("bhgn,bhnd->bhgd", w, values, precision="highest").reshape(b, 1, n_heads, d)
    return project(out), cache, out.sum((1, 3))
