"""The attention a model decodes with: dense, naive or certified, behind one signature.

A plug is `attend(q, k, v, cache, layer, project) -> (project(out), cache, record)`: it stores the token's key and value
at `layer` of a stacked cache and attends to everything stored. `q`, `out`: [b, 1, Hq, d]; `k`, `v`: [b, 1, Hkv, d]. It
is made for one step; its record is None, or `Certificate.packed` and what the layer's part of `cache.plan` is to be (or
None).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from certjax.attention import certified_layer, common_to_layers, naive_layer
from certjax.cache import TieredKVCache
from certjax.dense_cache import DenseKVCache
from certjax.errors import InvalidArgumentError
from certjax.fused.append import append
from certjax.fused.operands import Shared
from certjax.fused.project import projections
from certjax.policy import Policy
from pallas_kernels.dense.reference import dense_reference

Mode = Literal["dense", "naive", "certified"]
MODES: tuple[str, ...] = ("dense", "naive", "certified")
Plug = Callable[[jax.Array, jax.Array, jax.Array, Any, jax.Array, Callable], tuple[jax.Array, Any, Any]]


def make_plug(mode: Mode, policy: Policy, cache: DenseKVCache | TieredKVCache, n_query_heads: int) -> Plug:
    """The plug of a mode for the step that follows `cache`.

    What the layers of a step have in common is computed here, outside the loop over them.

    Raises
    ------
    InvalidArgumentError
        If the mode is unknown.
    """
    if mode == "dense":
        return _dense
    if mode in ("naive", "certified"):
        common = common_to_layers(cache.counting(), policy, n_query_heads, naive=mode == "naive")
        return functools.partial(_naive if mode == "naive" else _certified, policy=policy, common=common)
    raise InvalidArgumentError(f"unknown mode {mode!r}; choose one of {', '.join(MODES)}.")


def make_cache(mode: Mode, policy: Policy, prefilled: DenseKVCache) -> DenseKVCache | TieredKVCache:
    """The cache a mode decodes with, from the originals that prefill left on the device."""
    if mode == "dense":
        return prefilled
    cache = TieredKVCache.from_prefill(
        prefilled.keys, prefilled.values, policy, lengths=prefilled.length, capacity=prefilled.keys.shape[-2]
    )
    # Naive never looks at the originals, so it does not hold them.
    return cache.replace(host_keys=None, host_values=None) if mode == "naive" else cache


def _dense(q, k, v, cache: DenseKVCache, layer, project):
    b, _, n_heads, d = q.shape
    cache = cache.write(k, v, layer, cache.length)
    grouped = q[:, 0].astype(jnp.float32).reshape(b, k.shape[2], -1, d)
    out = dense_reference(grouped, cache.keys, cache.values, cache.length + 1, layer)
    return project(out.reshape(b, 1, n_heads, d)), cache, None


def _naive(q, k, v, cache: TieredKVCache, layer, project, *, policy: Policy, common: Shared | None):
    seen = append(cache.counting(), k[:, 0], v[:, 0], layer, policy, q.shape[2])
    out = naive_layer(q[:, 0], seen, layer, policy, common)
    return project(out[:, None]), seen.replace(length=cache.length), None


def _certified(q, k, v, cache: TieredKVCache, layer, project, *, policy: Policy, common: Shared | None):
    projects = projections(project, project.weights, cache, layer, policy, q.shape[2], q.dtype)
    out, certificate, plan, seen = certified_layer(
        q[:, 0], cache.counting(), layer, policy, common, *projects, token=(k[:, 0], v[:, 0])
    )
    return out, seen.replace(length=cache.length), (certificate.packed(), plan)
