"""What is done next with an attention output, while it is not certain yet that it will be returned."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from certjax.cache import TieredKVCache
from certjax.fused.dispatch import FUSED, chained, kernels_of, pick_backend
from certjax.policy import Policy

Project = Callable[[jax.Array], jax.Array]
"""Of an output."""

Again = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Of what a candidate was projected to, the output, and whether that is another, `[b Hkv]` int32: what the output is
projected to."""


def as_it_is(out: jax.Array) -> jax.Array:
    """The output, projected to nothing else."""
    return out


def projections(
    linear: Project,
    weights: dict[str, jax.Array] | None,
    cache: TieredKVCache,
    layer: jax.Array,
    policy: Policy,
    n_query_heads: int,
    dtype: jnp.dtype,
) -> tuple[Project, Again | None]:
    """`project` and `again` of `certified_layer`, of outputs `[b, Hq, d]`.

    `linear`: the projection, `[b, 1, Hq, d] -> [b, 1, D]`. `weights`: `kernel` `[L, Hq d, D]`, and perhaps `bias`, of
    all layers. In a chain of kernels both are kernels, where a model is bfloat16: its `dtype`, and its weights.
    """
    backend = pick_backend(policy, cache, n_query_heads)
    in_chain = backend in FUSED and chained(policy, kernels_of(backend, 1))
    if in_chain and weights is not None and dtype == weights["kernel"].dtype == jnp.bfloat16:
        return in_kernels(weights, layer)
    return lambda out: linear(out[:, None]), None


def in_kernels(weights: dict[str, jax.Array], layer: jax.Array) -> tuple[Project, Again]:
    """The same by `pallas_kernels.project`."""
    from pallas_kernels.project import triton as projecting

    w, bias = weights["kernel"], weights.get("bias")

    def rows(x):
        return x.reshape(x.shape[0], -1)

    def project(out):
        return projecting.project(rows(out), w, layer)

    def again(sums, out, revised):
        return projecting.project_again(sums, rows(out), w, bias, layer, revised)[:, None]

    return project, again
