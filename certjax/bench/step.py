"""A whole decode step of a LLaMA with random weights and random caches: what the layers cost beside their attention."""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from certjax import decode
from certjax.bench import timing, workloads
from certjax.bench.attention import dense, dense_names
from certjax.cache import TieredKVCache
from certjax.models.llama.config import LlamaConfig
from certjax.models.llama.modeling import decode_step, init_params
from certjax.policy import Policy

LLAMA_3_1_8B = LlamaConfig(
    vocab_size=128256, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, d_ff=14336,
    rms_eps=1e-5, context_length=131072, dtype="bfloat16",
)  # fmt: skip


@functools.partial(jax.jit, static_argnames=("config", "policy", "n", "room"))
def _caches(config: LlamaConfig, policy: Policy, n: int, room: int, key: jax.Array) -> TieredKVCache:
    """Every layer holds the concentrated workload. Encoded layer by layer."""

    def one(key):
        group = config.n_heads // config.n_kv_heads
        _, k, v = workloads.make("concentrated", key, 1, config.n_kv_heads, group, n, config.head_dim)
        return k, v

    k, v = lax.map(one, jax.random.split(key, config.n_layers))
    return TieredKVCache.from_prefill(k, v, policy, capacity=n + room)


def _nothing(q, k, v, cache, layer):
    return q, cache, None


def run(config: LlamaConfig, policy: Policy, n: int, *, steps: int = 24, seed: int = 0) -> dict[str, Any]:
    """Milliseconds a step: certified, naive, and with attention left out (what any attention comes on top of)."""
    room = -(-(4 * steps) // policy.block_size) * policy.block_size
    params = init_params(config, jax.random.key(seed))
    cache = jax.block_until_ready(_caches(config, policy, n, room, jax.random.key(seed + 1)))
    row: dict[str, Any] = {"context": n, "layers": config.n_layers}
    for name in ("without attention", "naive", "certified"):

        @functools.partial(jax.jit, donate_argnums=0)
        def many(cache, token, name=name):
            def body(carry, _):
                cache, token = carry
                if name == "without attention":
                    logits, cache, record = decode_step(config, params, cache, token, cache.length, _nothing)
                else:
                    logits, cache, record = decode.step(config, name, policy, params, cache, token)
                kept = None if record is None else (record.rung, record.bytes_paged_in)
                return (cache, jnp.argmax(logits, -1).astype(jnp.int32)), kept

            return lax.scan(body, (cache, token), None, length=steps)

        token = jnp.zeros(1, jnp.int32)
        (cache, token), _ = jax.block_until_ready(many(cache, token))
        began = time.perf_counter()
        (cache, token), kept = jax.block_until_ready(many(cache, token))
        row[name] = round((time.perf_counter() - began) * 1e3 / steps, 3)
        if name == "certified":
            rung, paged = (np.asarray(x) for x in kept)
            row["rungs"] = np.bincount(rung.ravel(), minlength=5).tolist()
            row["paged_in_MB_a_step"] = round(float(paged.sum()) / steps / 1e6, 3)
    group = config.n_heads // config.n_kv_heads
    q, k, v = workloads.make("concentrated", jax.random.key(seed), 1, config.n_kv_heads, group, n, config.head_dim)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    loop = timing.per_call(lambda q: q, q)[0]
    ops = [timing.per_call(functools.partial(dense, implementation=name), q, k, v)[4] - loop for name in dense_names()]
    row["dense attention, all layers"] = round(float(min(ops)) * config.n_layers / 1e3, 3)
    row["dense"] = round(row["without attention"] + row["dense attention, all layers"], 3)
    row["certified_over_dense"] = round(row["certified"] / row["dense"], 3)
    return row
