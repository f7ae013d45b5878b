"""What prefill of an 8B LLaMA takes of an H100's memory, without a GPU: `python -m benchmarks.prefill_memory`.

Compiles ahead of time (see `benchmarks/h100.py` for what that needs): the prefill that encodes a layer before the next
one begins, and, for comparison, the dense one with the whole cache made of what it leaves.
"""

# ruff: noqa: I001
from __future__ import annotations

import argparse

from benchmarks import h100  # first: it says which platform JAX runs on

import jax
import jax.numpy as jnp

from certjax import Policy, decode, host
from certjax.bench.step import LLAMA_3_1_8B
from certjax.models.llama.modeling import init_params
from certjax.plugs import make_cache

GB = 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", default="32768,131072")
    args = parser.parse_args()
    host.host_memory_kind = lambda device=None: host.PINNED  # the device that is compiled for has it
    policy, config = Policy.budget(0.05, block_size=128), LLAMA_3_1_8B
    params = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    for n in (int(x) for x in args.contexts.split(",")):
        capacity = n + policy.block_size
        tokens, lengths = jax.ShapeDtypeStruct((1, n), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)

        def by_layer(params, tokens, lengths, capacity=capacity):
            return decode.fill_tiered(config, policy.form, capacity, params, tokens, lengths)

        def dense(params, tokens, lengths, capacity=capacity):
            prefilled, logits = decode.fill(config, capacity, params, tokens, lengths)
            return make_cache("certified", policy, prefilled), logits

        for name, f in (("layer by layer", by_layer), ("dense, then encoded", dense)):
            compiled = jax.jit(f).trace(*h100.on_device((params, tokens, lengths), h100.device())).lower().compile()
            m = compiled.memory_analysis()
            total = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes
            print(
                f"{n}, {name}: {total / GB:.1f} GB (weights and arguments {m.argument_size_in_bytes / GB:.1f}, cache "
                f"{m.output_size_in_bytes / GB:.1f}, meanwhile {m.temp_size_in_bytes / GB:.1f}); on the host "
                f"{(m.host_output_size_in_bytes + m.host_temp_size_in_bytes) / GB:.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
