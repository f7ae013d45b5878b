"""What is done next with an attention output, while it is not certain yet that it will be returned."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from certjax.cache import TieredKVCache
from certjax.fused.dispatch import chained, pick_backend
from certjax.policy import Policy
from pallas_kernels.dispatch import mosaic_kernels


def projections(
    linear: Callable[[jax.Array], jax.Array],
    weights: dict[str, jax.Array] | None,
    cache: TieredKVCache,
    layer: jax.Array,
    policy: Policy,
    n_query_heads: int,
    dtype: jnp.dtype,
) -> tuple[Callable, Callable | None]:
    """`project` and `again` of `certified_layer`, of outputs `[b, Hq, d]`.

    `linear`: the projection, `[b, 1, Hq, d] -> [b, 1, D]`. `weights`: `kernel` `[L, Hq d, D]`, and perhaps `bias`, of
    all layers. In a chain of kernels both are kernels, where a model is bfloat16: its `dtype`, and its weights.
    """
    kernels = pick_backend(policy, cache, n_query_heads) == "mosaic_gpu" and chained(policy, mosaic_kernels(1))
    if kernels and weights is not None and dtype == weights["kernel"].dtype == jnp.bfloat16:
        return in_kernels(weights, layer)
    return lambda out: linear(out[:, None]), None


def in_kernels(weights: dict[str, jax.Array], layer: jax.Array) -> tuple[Callable, Callable]:
    from pallas_kernels.project import triton as projecting

    w, bias = weights["kernel"], weights.get("bias")

    def rows(x):
        return x.reshape(x.shape[0], -1)

    def project(out):
        return projecting.project(rows(out), w, layer)

    def again(sums, out, revised):
        return projecting.project_again(sums, rows(out), w, bias, layer, revised)[:, None]

    return project, again
