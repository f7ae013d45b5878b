"""Real activations: the queries, keys and values a model produces on a text. For studies, audits and tests."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from certjax.dense_cache import DenseKVCache
from certjax.errors import InvalidArgumentError
from certjax.model import Model
from certjax.models.llama.config import LlamaConfig
from certjax.models.llama.modeling import forward
from certjax.prefill import prefill, prefill_attention

CHUNK = 256


@struct.dataclass
class Captured:
    """Activations of one text of N tokens.

    Attributes
    ----------
    q : `[L, P, Hq, d]` float32
        Queries, after RoPE, at the last P positions.
    keys, values : `[L, 1, Hkv, N, d]`
        Originals as the cache holds them. The query at position p attends to the first p + 1.
    """

    q: jax.Array
    keys: jax.Array
    values: jax.Array

    @property
    def positions(self) -> range:
        """Position of each captured query."""
        n = self.keys.shape[-2]
        return range(n - self.q.shape[1], n)


def capture(model: Model, tokens, n_queries: int = 64) -> Captured:
    """Run `tokens` (`[N]`, N a multiple of 256) through the model and keep what its attention saw.

    Raises
    ------
    InvalidArgumentError
        If N is not a positive multiple of 256, exceeds the context, or is less than `n_queries`; or if
        `n_queries` exceeds 256.
    """
    n = len(tokens)
    if n == 0 or n % CHUNK or n > model.config.context_length:
        raise InvalidArgumentError(
            f"tokens must number a positive multiple of {CHUNK} up to {model.config.context_length}, got {n}."
        )
    if not 1 <= n_queries <= CHUNK:
        raise InvalidArgumentError(f"n_queries must be in [1, {CHUNK}], got {n_queries}.")
    q, keys, values = _run(model.config, model.params, jnp.asarray(np.asarray(tokens), jnp.int32)[None])
    return Captured(q=q[:, 0, -n_queries:], keys=keys, values=values)


@functools.partial(jax.jit, static_argnames="config")
def _run(config: LlamaConfig, params: Any, tokens: jax.Array):
    n = tokens.shape[1]
    length = jnp.full(1, n, jnp.int32)
    start = n - CHUNK
    cache = DenseKVCache.empty(config, 1, n)
    if start:
        cache, _ = prefill(config, params, cache, tokens[:, :start], length - CHUNK, chunk=CHUNK)

    def attend(q, k, v, cache, layer, project):
        cache = cache.write(k, v, layer, start)
        out = prefill_attention(q, cache.keys, cache.values, layer, jnp.int32(start), length)
        return project(out), cache, q.astype(jnp.float32)

    positions = start + lax.broadcasted_iota(jnp.int32, (1, CHUNK), 1)
    _, cache, q = forward(config, params, tokens[:, start:], positions, cache, attend)
    return q, cache.keys, cache.values
