"""Prefill: prompts through the model layer by layer, and of a layer chunk by chunk, with exact attention in float32.

A layer is done with before the next one begins, so that its keys and values can be encoded, and the originals sent to
the host, while there are those of no other layer: memory beside what is kept is the hidden states of the prompts, one
layer's originals, and O(chunk^2). The half of the scores above the diagonal is never computed. Keys and values are read
back as stored, so that prefill and decode see the same rounded originals.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from certjax.dense_cache import DenseKVCache
from certjax.errors import InvalidArgumentError
from certjax.models.llama.config import LlamaConfig
from certjax.models.llama.modeling import Block, Embed, RMSNorm, unembed
from certjax.models.llama.rope import rotation

MASKED = -1e30
"""Score of what a query does not see. Finite, so that a row that sees nothing gives 0 and not NaN."""


def prefill(
    config: LlamaConfig,
    params: dict,
    cache: DenseKVCache,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    chunk: int = 256,
    keep: Callable[[jax.Array, jax.Array], Any] | None = None,
) -> tuple[Any, jax.Array]:
    """Run prompts through the model from position 0 and keep their keys and values.

    Parameters
    ----------
    cache
        Overwritten from column 0 on; its `length` is not read. With `keep`, of a single layer, which is used for one
        after the other.
    tokens : `[b, T_pad]` int32
        Padded on the right, with any valid id.
    lengths : `[b]` int32
        Tokens of each prompt, from 1 to T_pad. Chunks beyond the longest are not computed.
    chunk
        Tokens processed at once; static. The result depends on it by rounding only.
    keep
        Of a layer's keys and values, `[b, Hkv, N, d]`, unspecified beyond a row's length: what is kept of them.

    Returns
    -------
    cache
        With `length=lengths`; what is beyond a row's length is unspecified. With `keep`, what that returned, stacked
        over layers, in its place.
    logits : `[b, V]` float32
        At the last token of each prompt.

    Raises
    ------
    InvalidArgumentError
        If T_pad is not a multiple of `chunk` or does not fit the cache, or shapes disagree; with `keep`, if the cache
        is not of one layer.
    """
    _check(cache, tokens, lengths, chunk)
    if keep is not None and cache.keys.shape[0] != 1:
        raise InvalidArgumentError(
            f"keep: one layer's room is used for all, and the cache has {cache.keys.shape[0]}; build it with one."
        )
    batch = tokens.shape[0]
    n_chunks = (lengths.max() + chunk - 1) // chunk

    def visit_layer(carry, of_layer):
        weights, layer = of_layer
        place = layer if keep is None else jnp.int32(0)

        def visit(i, carry):
            x, cache = carry
            start = i * chunk
            piece = lax.dynamic_slice_in_dim(x, start, chunk, axis=1)  # [b, chunk, D]
            positions = jnp.broadcast_to(start + jnp.arange(chunk, dtype=jnp.int32), (batch, chunk))
            block = Block(config, functools.partial(_attend, start=start, lengths=lengths))
            turn = rotation(config, positions)
            (piece, cache), _ = block.apply({"params": weights}, (piece, cache), place, turn)
            return lax.dynamic_update_slice_in_dim(x, piece, start, axis=1), cache

        x, cache = lax.fori_loop(0, n_chunks, visit, carry)
        return (x, cache), None if keep is None else keep(cache.keys[0], cache.values[0])

    x = Embed(config).apply({"params": params["embed"]}, tokens)  # [b, T_pad, D]
    layers = params["layers"], jnp.arange(config.n_layers, dtype=jnp.int32)
    (x, cache), kept = lax.scan(visit_layer, (x, cache), layers)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    last = RMSNorm(config).apply({"params": params["final_norm"]}, last)
    found = cache.replace(length=lengths.astype(jnp.int32)) if keep is None else kept
    return found, unembed(config, params, last)


def _attend(q, k, v, cache: DenseKVCache, layer, project, *, start, lengths):
    cache = cache.write(k, v, layer, start)
    return project(prefill_attention(q, cache.keys, cache.values, layer, start, lengths)), cache, None


def prefill_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    layer: jax.Array,
    start: jax.Array,
    lengths: jax.Array,
) -> jax.Array:
    """Exact causal attention of a chunk of queries over a cache that holds them and everything earlier.

    Online softmax over chunks of C keys; scores, weights and sums in float32. A query at position p sees the
    positions up to p that are below its row's length, and nothing beyond that length, not even by 0 times NaN. (An
    infinite or NaN value *below* the length reaches every query of its chunk of keys, the earlier ones included.)

    Parameters
    ----------
    q : `[b, C, Hq, d]`
        Queries at positions `start ... start + C - 1`.
    keys, values : `[L, b, Hkv, N, d]`
        `N >= start + C`.
    layer, start : `[]` int32
        `start` is a multiple of C.
    lengths : `[b]` int32

    Returns
    -------
    `[b, C, Hq, d]` float32. Queries at or beyond their row's length get finite values without meaning.
    """
    b, c, n_heads, d = q.shape
    n_kv_heads = keys.shape[2]
    group = n_heads // n_kv_heads
    # [b, Hkv, G*C, d]: one product per KV head serves its G query heads.
    q = q.astype(jnp.float32).reshape(b, c, n_kv_heads, group, d).transpose(0, 2, 3, 1, 4)
    q = q.reshape(b, n_kv_heads, group * c, d) * d**-0.5
    offsets = jnp.arange(c, dtype=jnp.int32)
    query_position = jnp.tile(start + offsets, group)  # [G*C]
    dot = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)

    def load(stack, column):
        tile = lax.dynamic_slice(stack, (layer, 0, 0, column, 0), (1, b, n_kv_heads, c, d))
        return tile[0].astype(jnp.float32)

    def visit(j, carry):
        m, z, acc = carry  # running maximum, normalizer [b, Hkv, G*C]; weighted sum [b, Hkv, G*C, d]
        key_position = j * c + offsets
        stored = key_position < lengths[:, None]  # [b, C]
        seen = (key_position <= query_position[:, None]) & stored[:, None, None, :]  # [b, 1, G*C, C]
        s = jnp.where(seen, dot("bhqd,bhkd->bhqk", q, load(keys, j * c)), MASKED)
        v = jnp.where(stored[:, None, :, None], load(values, j * c), 0.0)
        m_new = jnp.maximum(m, s.max(-1))
        p = jnp.where(seen, jnp.exp(s - m_new[..., None]), 0.0)
        shrink = jnp.exp(m - m_new)
        acc = acc * shrink[..., None] + dot("bhqk,bhkd->bhqd", p, v)
        return m_new, z * shrink + p.sum(-1), acc

    rows = (b, n_kv_heads, group * c)
    first = (jnp.full(rows, MASKED), jnp.zeros(rows), jnp.zeros((*rows, d)))
    _, z, acc = lax.fori_loop(0, start // c + 1, visit, first)
    out = acc / jnp.where(z == 0, 1.0, z)[..., None]
    out = out.reshape(b, n_kv_heads, group, c, d).transpose(0, 3, 1, 2, 4)
    return out.reshape(b, c, n_heads, d)


def _check(cache: DenseKVCache, tokens: jax.Array, lengths: jax.Array, chunk: int) -> None:
    if tokens.ndim != 2 or lengths.shape != tokens.shape[:1] or cache.length.shape != lengths.shape:
        raise InvalidArgumentError(
            f"tokens {tokens.shape} must be [b, T_pad], lengths {lengths.shape} and the cache's batch "
            f"{cache.length.shape} [b]."
        )
    padded = tokens.shape[1]
    if chunk < 1 or padded == 0 or padded % chunk:
        raise InvalidArgumentError(
            f"tokens are padded to {padded}, which is not a positive multiple of chunk={chunk}; pad the prompts on "
            "the right, or choose a chunk that divides their length."
        )
    if padded > cache.max_length:
        raise InvalidArgumentError(
            f"tokens are padded to {padded} and the cache holds {cache.max_length}; build it with a larger max_length."
        )
