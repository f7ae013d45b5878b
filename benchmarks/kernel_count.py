"""How many GPU kernels one fused step is, without a GPU: `python -m benchmarks.kernel_count --context 65536`.

Compiles ahead of time (see `benchmarks/h100.py` for what that needs).
"""

# ruff: noqa: I001
from __future__ import annotations

import argparse
import collections
import re

from benchmarks import h100  # first: it says which platform JAX runs on

import jax
import jax.numpy as jnp

from certjax import Policy, TieredKVCache
from certjax.bench.attention import SHAPE
from certjax.fused.attention import fused_attention, fused_naive
from pallas_kernels.dispatch import mosaic_kernels

NO_KERNEL = ("parameter", "get-tuple-element", "bitcast", "tuple", "constant")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=65536)
    parser.add_argument("--verbose", action="store_true", help="list the kernels")
    args = parser.parse_args()
    device = h100.device()
    policy, heads, group, d = Policy.budget(0.05, block_size=128), *SHAPE.values()
    originals = jax.ShapeDtypeStruct((1, 1, heads, args.context, d), jnp.bfloat16)
    cache = jax.eval_shape(
        lambda k, v: TieredKVCache.from_prefill(k, v, policy, capacity=args.context), originals, originals
    )
    q = jax.ShapeDtypeStruct((1, heads, group, d), jnp.float32)
    kernels = mosaic_kernels(heads)
    functions = {
        "certified": lambda q, c: fused_attention(q, c, jnp.int32(0), policy, kernels, jnp.ones(1, bool)),
        "naive": lambda q, c: fused_naive(q, c, jnp.int32(0), policy, kernels),
    }
    for name, f in functions.items():
        text = jax.jit(f).trace(*h100.on_device((q, cache), device)).lower().compile().as_text()
        found = re.findall(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\(", text[text.index("ENTRY") :], re.M)
        found = [x for x in found if x[2] not in NO_KERNEL]
        print(name, len(found), dict(collections.Counter(kind for *_, kind in found)))
        if args.verbose:
            for operation, shape, _ in found:
                print("  ", operation, shape[:90])


if __name__ == "__main__":
    main()
