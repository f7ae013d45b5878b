"""Synthetic decode problems: queries, keys and values of one layer, with a known shape of attention."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

Workload = Literal["concentrated", "heavy-tailed", "flat"]
WORKLOADS: tuple[str, ...] = ("concentrated", "heavy-tailed", "flat")

SINK, RECENT, NEEDLES, RETRIEVERS = 16.0, 10.0, 4, 4
"""Scores, over a standard normal tail, of the first token and of needles; of the last 32 tokens; needles of a KV head
that retrieves; one KV head of so many does."""


def make(
    kind: Workload, key: jax.Array, batch: int, n_kv_heads: int, group: int, n: int, d: int, dtype=jnp.bfloat16
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`q` [b, Hkv G, d] float32, standard normal, and what is `around` it: keys and values [b, Hkv, n, d]."""
    of_queries, of_cache = jax.random.split(key)
    q = jax.random.normal(of_queries, (batch, n_kv_heads, group, d))
    return q.reshape(batch, -1, d), *around(kind, of_cache, q, n, dtype)


def around(kind: Workload, key: jax.Array, q: jax.Array, n: int, dtype=jnp.bfloat16) -> tuple[jax.Array, jax.Array]:
    """Keys and values [b, Hkv, n, d] to which `q` [b, Hkv, G, d], components of order one, attends as `kind` says.

    * concentrated: a sink with a short value and recent tokens in a tail of small scores; needles in one KV head of 4;
    * heavy-tailed: scores of a t distribution with three degrees of freedom;
    * flat: scores near zero, values without a common part. No compression can certify a small relative error here.
    """
    of_keys, of_values, of_needles, of_tail = jax.random.split(key, 4)
    q = q.astype(jnp.float32)
    shape, d = q.shape[:2], q.shape[-1]
    common = q.mean(2)  # what the heads of a group share
    unit = common / jnp.square(common).sum(-1, keepdims=True) * d**0.5  # a key with this much of it scores 1
    keys = jax.random.normal(of_keys, (*shape, n, d))
    values = jax.random.normal(of_values, (*shape, n, d))
    if kind == "heavy-tailed":
        want = 2 * jax.random.t(of_tail, 3.0, (*shape, n))
        keys = keys + jnp.clip(want, -18, 18)[..., None] * unit[:, :, None]
    elif kind == "concentrated":
        at = jax.random.randint(of_needles, (*shape, NEEDLES), n // 16, n - n // 16)
        lift = jnp.zeros((*shape, n)).at[..., 0].set(SINK).at[..., -32:].set(RECENT)
        rows, heads = jnp.arange(shape[0])[:, None, None], jnp.arange(shape[1])[:, None]
        needles = jnp.where((jnp.arange(shape[1]) % RETRIEVERS == 0)[:, None], SINK, 0.0)
        lift = lift.at[rows, heads, at].add(needles)
        keys = keys + lift[..., None] * unit[:, :, None]
        values = values.at[:, :, 0].multiply(0.1)
    else:
        keys = 0.1 * keys
    return keys.astype(dtype), values.astype(dtype)
