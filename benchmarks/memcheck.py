"""Every kernel once, for a checker of memory accesses, on a GPU:
`compute-sanitizer --tool memcheck python -m benchmarks.memcheck`.

Run it without the checker first, with all that is compiled kept (`JAX_COMPILATION_CACHE_DIR`,
`JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0`): compiling under it can crash. Both times let every array be an
allocation of its own (`XLA_PYTHON_CLIENT_ALLOCATOR=platform`): in a pool what lies beyond an array is another one's.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from certjax import Policy, TieredKVCache, certified_attention, decode
from certjax.fused.dispatch import COMPILED
from certjax.models.llama.config import LlamaConfig
from certjax.models.llama.modeling import init_params
from certjax.sampling import Sampling

B, H, N = 2, 2, 1536
GROUPS = {64: 4, 128: 6}
"""Head dim -> query heads of a group."""
LENGTHS = jnp.array([1536, 1157])
POLICIES = {
    "by_plan": Policy.budget(0.6, block_size=128),
    "promoting": Policy.budget(0.25, block_size=128, host_price=0.01, max_promoted=1.0),
    "dense": Policy.budget(0.002, block_size=128),
    "observed": Policy.observe(block_size=128),
}
CONFIG = LlamaConfig(
    vocab_size=256, d_model=512, n_layers=2, n_heads=8, n_kv_heads=2, head_dim=128, d_ff=512, rms_eps=1e-5,
    context_length=4096, dtype="bfloat16",
)  # fmt: skip
PROMPT, STEPS = 1024, 140
"""So that a block is completed on the way."""


@functools.cache
def problem(d: int) -> tuple[jax.Array, TieredKVCache]:
    """Queries `[b, Hq, d]` and a cache in which each KV head has a needle; its plan has every tile at level 0, and does
    not hold, so that there is a second pass."""
    a, b, c = jax.random.split(jax.random.key(d), 3)
    q = jax.random.normal(c, (B, H, GROUPS[d], d))
    keys, values = (jax.random.normal(k, (B, H, N, d)) for k in (a, b))
    keys = keys.at[:, :, 400].set(2 * q.mean(2)).astype(jnp.bfloat16)
    build = jax.jit(lambda k, v: TieredKVCache.from_prefill(k, v, POLICIES["by_plan"], lengths=LENGTHS, capacity=N))
    cache = build(keys, (values + 0.5).astype(jnp.bfloat16))
    return q.reshape(B, -1, d).astype(jnp.bfloat16), cache.replace(plan=jnp.zeros_like(cache.plan))


def by_rung(rungs: jax.Array) -> list[int]:
    """How many there are of each."""
    return np.bincount(np.asarray(rungs).ravel(), minlength=5).tolist()


def attended(d: int, policy: Policy) -> list[int]:
    """Head-steps of one call by rung."""
    _, certificate = jax.jit(certified_attention, static_argnums=2)(*problem(d), policy)
    return by_rung(certificate.rung)


def decoded(policy: Policy) -> list[int]:
    """The same of a model's steps: tokens appended, a block encoded, the output projected."""
    params = init_params(CONFIG, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, PROMPT), 0, CONFIG.vocab_size)
    fixed = CONFIG, "certified", policy, Sampling()
    lengths = jnp.array([PROMPT, PROMPT - 100])
    state = decode.start(*fixed, 2048, STEPS + 1, params, tokens, lengths, jax.random.key(2))
    state = jax.block_until_ready(decode.run(*fixed, params, state, jnp.int32(STEPS)))
    telemetry = jax.device_get(state.telemetry)
    return by_rung(telemetry.certificate.rung[telemetry.valid[:, 0]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", default=",".join(COMPILED), help="comma separated; default: all compiled ones")
    parser.add_argument("--policies", default=",".join(POLICIES), help="comma separated; default: all")
    args = parser.parse_args()
    if jax.default_backend() != "gpu" and set(args.backends.split(",")) & set(COMPILED):
        parser.error("needs a GPU, or --backends reference.")
    for backend in args.backends.split(","):
        for name in args.policies.split(","):
            policy = dataclasses.replace(POLICIES[name], backend=backend)
            rungs = {f"d={d}": attended(d, policy) for d in GROUPS}
            if name in ("by_plan", "dense"):
                rungs["decoded"] = decoded(policy)
            print(json.dumps({"backend": backend, "policy": name, "head_steps_by_rung": rungs}), flush=True)


if __name__ == "__main__":
    main()
