"""What the host does in a decode loop: runtime calls a step that wait for the device or copy between the two.
`python -m benchmarks.host_syncs`; XLA_FLAGS apply.

A small model with the fused kernels' shape decodes under JAX's profiler.
"""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import traces
from certjax import decode
from certjax.bench.attention import default_policy
from certjax.bench.step import LLAMA_3_1_8B
from certjax.models.llama.modeling import init_params
from certjax.sampling import Sampling

CONFIG = dataclasses.replace(LLAMA_3_1_8B, n_layers=4, vocab_size=1024, d_ff=1024, d_model=1024)
PROMPT, STEPS = 2048, 100


def main() -> None:
    params = init_params(CONFIG, jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, PROMPT)), jnp.int32)
    for mode in ("dense", "naive", "certified"):
        print(json.dumps({"mode": mode, "steps": STEPS, "a_step": calls(mode, params, tokens)}), flush=True)


def calls(mode: str, params, tokens: jax.Array) -> dict[str, float]:
    policy = default_policy()
    fixed = CONFIG, mode, policy, Sampling()
    lengths = jnp.full(1, PROMPT, jnp.int32)
    state = decode.start(*fixed, PROMPT + 256, 2 * STEPS + 2, params, tokens, lengths, jax.random.key(0))
    state = jax.block_until_ready(decode.run(*fixed, params, state, jnp.int32(STEPS)))
    events = traces.events(decode.run, *fixed, params, state, jnp.int32(2 * STEPS))
    return traces.host_waits(events, STEPS)


if __name__ == "__main__":
    main()
