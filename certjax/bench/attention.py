"""The attention op of one layer: dense, naive and certified, side by side on one workload."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from certjax.attention import certified_layer, common_to_layers, naive_layer
from certjax.bench import timing, workloads
from certjax.cache import TieredKVCache
from certjax.certificate import Certificate
from certjax.fused.dispatch import COMPILED, pick_backend
from certjax.policy import Policy
from certjax.programs import accepted
from pallas_kernels.levels import COARSE

SHAPE = dict(n_kv_heads=8, group=4, d=128)
"""One layer of LLaMA 3.1 8B."""


def default_policy(tolerance: float = 0.05, **overrides) -> Policy:
    """What the fused kernels cover, at a tolerance relative to the layer's norm."""
    return Policy.budget(tolerance, block_size=128, **overrides)


@functools.partial(jax.jit, static_argnames=("kind", "batch", "n", "n_kv_heads", "group", "d"))
def _problem(kind, key, batch, n, n_kv_heads, group, d):
    return workloads.make(kind, key, batch, n_kv_heads, group, n, d)


@functools.partial(jax.jit, static_argnames="policy")
def build(keys: jax.Array, values: jax.Array, policy: Policy) -> TieredKVCache:
    """A stack of one layer that holds `[b, Hkv, n, d]`, but for the last token: plans are made anew at whole blocks."""
    batch, _, n, _ = keys.shape
    return TieredKVCache.from_prefill(
        keys[None], values[None], policy, lengths=jnp.full(batch, n - 1, jnp.int32), capacity=n
    )


@functools.partial(jax.jit, static_argnames="policy")
def planned(q: jax.Array, cache: TieredKVCache, policy: Policy) -> jax.Array | None:
    """The plan after one more step with `q`."""
    plan = certified_layer(q, cache, jnp.int32(0), policy)[2]
    return None if plan is None else plan[None]


def settled(q: jax.Array, cache: TieredKVCache, policy: Policy, steps: int = 3) -> TieredKVCache:
    """The cache as steps with much the same queries leave it to the next."""
    for _ in range(steps):
        cache = cache.replace(plan=planned(q, cache, policy))
    return cache


def forgetful(cache: TieredKVCache) -> TieredKVCache:
    """With a plan that knows of nothing that has to be read finely or from the host: where something has to, the bound
    does not hold, and a plan is made anew."""
    return cache.replace(plan=None if cache.plan is None else jnp.minimum(cache.plan, COARSE))


def dense_names() -> tuple[str, ...]:
    """Implementations of `jax.nn.dot_product_attention` that this device has."""
    return ("cudnn", "xla") if jax.devices()[0].platform == "gpu" else ("xla",)


def dense(q: jax.Array, k: jax.Array, v: jax.Array, *, implementation: str) -> jax.Array:
    """Dense decode attention in bfloat16. `q`: [b, Hq, d]; `k`, `v`: [b, n, Hkv, d], the layout that cuDNN reads."""
    b, _, h, d = k.shape[0], k.shape[1], q.shape[1], k.shape[3]
    q = q.astype(jnp.bfloat16).reshape(b, 1, h, d)
    return jax.nn.dot_product_attention(q, k, v, implementation=implementation)


def run(
    policy: Policy, contexts: list[int], batches: list[int], kinds: list[str], *, loops: int = 9, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """One row a context, batch and workload. Ratios are to the best dense implementation of the same row.

    Yields
    ------
    dict
        Microseconds (p50, p95, p99), bytes, counts and the certificate's figures.
    """
    for n in contexts:
        for batch in batches:
            baseline = None
            for kind in kinds:
                q, k, v = _problem(kind, jax.random.key(seed), batch, n, **SHAPE)
                if baseline is None:
                    kd, vd = (jax.block_until_ready(x.swapaxes(1, 2)) for x in (k, v))
                    baseline = time_dense(q, kd, vd, loops)
                    del kd, vd
                yield time_certified(kind, q, build(k, v, policy), policy, baseline, loops)


def ways_to_compile() -> dict[str, dict[str, Any] | None]:
    """Options of XLA that dense attention is measured with, by what is added to its name: as JAX compiles by itself,
    and, on a GPU, as programs with kernels are compiled."""
    return {"": None} | ({", options of ours": accepted()} if jax.devices()[0].platform == "gpu" else {})


def time_dense(q: jax.Array, k: jax.Array, v: jax.Array, loops: int) -> dict[str, dict[str, float]]:
    """Microseconds a call of each implementation, compiled each way. `k`, `v`: [b, n, Hkv, d]."""
    return {
        name + way: timing.quantiles(
            timing.per_call(functools.partial(dense, implementation=name), q, k, v, loops=loops, options=options)
        )
        for name in dense_names()
        for way, options in ways_to_compile().items()
    }


def time_certified(
    kind: str, q: jax.Array, cache: TieredKVCache, policy: Policy, baseline: dict[str, dict[str, float]], loops: int
) -> dict[str, Any]:
    """A row of `run`: by a plan that holds, and with one made anew. `cache`: of `build`."""
    cache = jax.block_until_ready(settled(q, cache, policy))
    n, batch, layer = cache.capacity, q.shape[0], jnp.int32(0)
    backend, reason = pick_backend(policy, cache, q.shape[1], explain=True)

    # Once a step, for all layers.
    common, of_naive = (
        jax.jit(lambda cache, naive=naive: common_to_layers(cache, policy, q.shape[1], naive=naive))(cache)
        for naive in (False, True)
    )

    def certified(q, cache, common):
        out, record, plan, _ = certified_layer(q, cache, layer, policy, common)
        return out, (record.packed(), plan)

    def naive(q, cache, common):
        return naive_layer(q, cache, layer, policy, common)

    _, (record, plan) = jax.jit(certified)(q, cache, common)
    record = jax.device_get(Certificate.unpacked(record[None]))
    best = min(x["p50"] for x in baseline.values())
    options = accepted() if backend in COMPILED else None  # as a decode step is compiled
    times = {
        "certified": timing.quantiles(timing.per_call(certified, q, cache, common, loops=loops, options=options)),
        "naive": timing.quantiles(timing.per_call(naive, q, cache, of_naive, loops=loops, options=options)),
    }
    if plan is not None:
        forgot = forgetful(cache)
        common = jax.jit(lambda cache: common_to_layers(cache, policy, q.shape[1]))(forgot)
        times["planned anew"] = timing.quantiles(
            timing.per_call(certified, q, forgot, common, loops=loops, options=options)
        )
    sizes = cache.nbytes()
    originals = sizes["tier2"]
    read, paged = (float(getattr(record, f).sum()) for f in ("bytes_read", "bytes_paged_in"))
    seconds = times["certified"]["p50"] * 1e-6
    return {
        "context": n,
        "batch": batch,
        "workload": kind,
        "backend": backend,
        "reason": reason,
        "dense_us": baseline,
        "certified_us": times["certified"],
        "planned_anew_us": times.get("planned anew"),
        "naive_us": times["naive"],
        "certified_over_dense": round(times["certified"]["p50"] / best, 3),
        "naive_over_dense": round(times["naive"]["p50"] / best, 3),
        "dense_bytes": originals,
        "bytes_read": read,
        "bytes_paged_in": paged,
        "read_GBps": round(read / seconds / 1e9, 1),
        "device_bytes_over_dense": round((sizes["tier1"] + sizes["windows"]) / originals, 4),
        "rungs": np.bincount(np.asarray(record.rung).ravel(), minlength=5).tolist(),
        "tiles_skipped": float(record.n_value_skipped.mean()),
        "tiles_finest": float(record.n_key_refined.mean()),
        "tiles_promoted": float(record.k_star.mean()),
        "bound_over_tolerance": round(
            float(np.sqrt(np.square(np.where(record.rung >= 3, 0.0, record.e_total)).mean())
                  / max(float(np.sqrt(np.square(record.out_norm).mean())) * policy.tolerance, 1e-30)), 3
        ),
    }  # fmt: skip
