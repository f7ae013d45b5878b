"""A whole decode step of a LLaMA with random weights, its caches made around its own queries."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from certjax import decode
from certjax.bench import timing, workloads
from certjax.bench.attention import dense, dense_names, forgetful, time_dense, ways_to_compile
from certjax.cache import TieredKVCache
from certjax.dense_cache import DenseKVCache
from certjax.fused.dispatch import pick_backend
from certjax.models.llama.config import LlamaConfig
from certjax.models.llama.modeling import decode_step, forward, init_params
from certjax.policy import Policy
from certjax.programs import jitted

LLAMA_3_1_8B = LlamaConfig(
    vocab_size=128256, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, d_ff=14336,
    rms_eps=1e-5, context_length=131072, dtype="bfloat16",
)  # fmt: skip


STEPS, LOOPS = 8, 16
"""Steps of one timed loop, and loops: together they complete a block of 128 tokens, and what was recent stays in the
window. The first loop is not counted."""

ANEW = "certified, planned anew"
MODES = "certified", ANEW, "naive", "without attention"
"""What one cache serves, each for `LOOPS` loops. Every step has the same queries, so that plans hold; where they are
planned anew, the bound of no layer holds (`bench.attention.forgetful`)."""

QUICK = "certified", "without attention"
"""What certified over dense is made of."""


def room(policy: Policy) -> int:
    """Tokens that the modes append, in whole blocks."""
    return -(-len(MODES) * LOOPS * STEPS // policy.block_size) * policy.block_size


@functools.partial(jax.jit, static_argnames=("config", "policy", "kind", "n", "batch"))
def tiered_cache(
    config: LlamaConfig, policy: Policy, kind: str, params: Any, n: int, batch: int, key: jax.Array
) -> TieredKVCache:
    """Every layer holds the workload, made around the queries that the model has there for token 0 at position n."""

    def attend(q, k, v, cache, layer, project):
        grouped = q[:, 0].reshape(batch, config.n_kv_heads, -1, config.head_dim)
        k, v = workloads.around(kind, jax.random.fold_in(key, layer), grouped, n, jnp.dtype(config.kv_dtype))
        out = dense(q[:, 0], k.swapaxes(1, 2), v.swapaxes(1, 2), implementation="xla")
        return project(out), cache, (k, v)

    tokens = jnp.zeros((batch, 1), jnp.int32)
    _, _, (k, v) = forward(config, params, tokens, jnp.full_like(tokens, n), None, attend)
    return TieredKVCache.from_prefill(k, v, policy, capacity=n + room(policy))


def dense_cache(config: LlamaConfig, n: int, batch: int) -> DenseKVCache:
    """`n` tokens of zeros: dense attention takes as long whatever it reads."""
    return DenseKVCache.empty(config, batch, n + LOOPS * STEPS).advance(n)


def _nothing(q, k, v, cache, layer, project):
    """Keys and values are kept, as any attention would: what nobody asks for, their projections, is not computed."""
    return project(q), cache, (k, v)


@functools.partial(jitted, static_argnames=("config", "mode", "policy", "steps"), donate_argnames=("cache",))
def many(config: LlamaConfig, mode: str, policy: Policy, steps: int, params: Any, cache, n: jax.Array):
    """Steps that append to the cache. All feed token 0 at position `n`, for whose queries the cache was made; each
    waits for the one before."""

    def body(carry, _):
        cache, token = carry
        positions = jnp.full_like(token, n)
        if mode == "without attention":
            logits, cache, kept = decode_step(config, params, cache, token, positions, _nothing)
        else:
            plug, cache = ("certified", forgetful(cache)) if mode == ANEW else (mode, cache)
            logits, cache, record = decode.step(config, plug, policy, params, cache, token, positions)
            kept = None if record is None else (record.rung, record.bytes_paged_in)
        # 0, of which the compiler knows nothing: every step waits for the logits of the one before.
        token = jnp.isnan(logits).all(-1).astype(jnp.int32)
        return (cache, token), kept

    token = jnp.zeros(cache.length.shape, jnp.int32)
    (cache, token), kept = lax.scan(body, (cache, token), None, length=steps)
    return cache, token, kept  # the token, too: nobody computes what nobody asks for


def run(
    config: LlamaConfig,
    policy: Policy,
    contexts: list[int],
    batches: list[int],
    kinds: list[str],
    *,
    seed: int = 0,
    quick: bool = False,
) -> Iterator[dict[str, Any]]:
    """One row a context, batch and workload. `quick`: certified and dense alone.

    Yields
    ------
    dict
        Milliseconds a step (p50, p95, p99 of loops of 8): certified, by plans that hold and by new ones, naive, dense
        as this library does it (`dense mode`), and with attention left out, which any attention comes on top of: keys
        and values are computed and kept. `dense` is the latter plus the best dense attention op for every layer,
        without the loop's overhead and what it costs to begin a kernel.
    """
    params = init_params(config, jax.random.key(seed))
    for n in contexts:
        for batch in batches:
            attention = _dense_attention(config, n, batch, seed)
            for kind in kinds:
                yield _row(config, policy, params, n, batch, kind, attention, seed, quick)


def _row(
    config: LlamaConfig, policy: Policy, params, n: int, batch: int, kind: str, attention: float, seed: int, quick: bool
) -> dict[str, Any]:
    cache = jax.block_until_ready(tiered_cache(config, policy, kind, params, n, batch, jax.random.key(seed + 1)))
    sizes = cache.nbytes()
    row: dict[str, Any] = {
        "context": n, "batch": batch, "workload": kind, "layers": config.n_layers,
        "backend": pick_backend(policy, cache, config.n_heads),
    }  # fmt: skip
    for name in QUICK if quick else MODES:  # all compiled alike
        row[name], cache, kept = timed(config, name, policy, params, cache, n)
        if name.startswith("certified"):
            rung, paged = (np.asarray(x) for x in kept)
            row[f"rungs, {name}"] = np.bincount(rung.ravel(), minlength=5).tolist()
            row[f"paged_in_MB_a_step, {name}"] = round(float(paged.sum()) / STEPS / 1e6, 3)
    del cache
    row["dense attention, all layers"] = round(attention, 3)
    row["dense"] = round(row["without attention"]["p50"] + attention, 3)
    row["certified_over_dense"] = round(row["certified"]["p50"] / row["dense"], 3)
    if not quick:
        row["dense mode"], _, _ = timed(config, "dense", policy, params, dense_cache(config, n, batch), n)
        row["naive_over_dense"] = round(row["naive"]["p50"] / row["dense"], 3)
    row["device_bytes_over_dense"] = round((sizes["tier1"] + sizes["windows"]) / sizes["tier2"], 4)
    return row


def timed(config: LlamaConfig, mode: str, policy: Policy, params, cache, n: int):
    """Milliseconds a step (p50, p95, p99 of loops), the cache afterwards, and what the last loop's records keep."""
    figures = []
    for _ in range(LOOPS):
        began = time.perf_counter()
        cache, _, kept = jax.block_until_ready(many(config, mode, policy, STEPS, params, cache, jnp.int32(n)))
        figures.append((time.perf_counter() - began) * 1e3 / STEPS)
    return timing.quantiles(np.array(figures[1:])), cache, kept


def _dense_attention(config: LlamaConfig, n: int, batch: int, seed: int) -> float:
    """Milliseconds of the best dense attention op, all layers, the loop's overhead taken off."""
    group = config.n_heads // config.n_kv_heads
    q, k, v = workloads.make("flat", jax.random.key(seed), batch, config.n_kv_heads, group, n, config.head_dim)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    found = time_dense(q, k, v, loops=9)
    best = min(
        min(found[name + way]["p50"] for name in dense_names())
        - timing.quantiles(timing.per_call(lambda q: q, q, options=options))["p50"]
        for way, options in ways_to_compile().items()
    )
    return best * config.n_layers / 1e3
