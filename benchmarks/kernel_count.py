"""How many GPU kernels the attention of a layer is, in a loop over layers as in a decode step, without a GPU:
`python -m benchmarks.kernel_count --context 65536`.

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
from certjax.fused import dispatch
from certjax.fused.attention import fused_naive
from certjax.fused.chain import chained_attention
from certjax.fused.operands import shared
from pallas_kernels import launch

NO_KERNEL = ("parameter", "get-tuple-element", "bitcast", "tuple", "constant")
LAYERS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=65536)
    parser.add_argument("--verbose", action="store_true", help="list the kernels")
    parser.add_argument("--backend", default="mosaic_gpu", choices=dispatch.COMPILED)
    parser.add_argument("--capability", default="9.0", help="of the GPU; others than 9.0 with --backend triton")
    args = parser.parse_args()
    device = h100.device(args.capability)
    policy, heads, group, d = Policy.budget(0.05, block_size=128), *SHAPE.values()
    originals = jax.ShapeDtypeStruct((LAYERS, 1, heads, args.context, d), jnp.bfloat16)
    cache = jax.eval_shape(
        lambda k, v: TieredKVCache.from_prefill(k, v, policy, capacity=args.context), originals, originals
    )
    q = jax.ShapeDtypeStruct((1, heads, group, d), jnp.float32)
    dispatch._device = lambda: ("gpu", args.capability)
    kernels, launch.capability = dispatch.kernels_of(args.backend, heads), lambda: int(args.capability.replace(".", ""))
    sound = jnp.ones(1, bool)
    functions = {
        "certified": lambda q, c, *x: _packed(*chained_attention(q, c, x[0], policy, kernels, sound, x[1])[:3]),
        "naive": lambda q, c, *x: (fused_naive(q, c, x[0], policy, kernels, x[1]), None),
    }
    for name, f in functions.items():

        def step(q, cache, f=f, name=name):
            common = shared(cache, name == "naive")

            def visit(q, layer):
                out, record = f(q, cache, layer, common)
                return q + out, record

            return jax.lax.scan(visit, q, jnp.arange(LAYERS))

        text = jax.jit(step).trace(*h100.on_device((q, cache), device)).lower().compile().as_text()
        (body,) = re.findall(r"body=%?([\w.\-]+)", text[re.search("^ENTRY", text, re.M).start() :])
        in_loop, before = (kernels_of(text, start) for start in (f"%{body} ", "ENTRY"))
        print(f"{name}: {len(in_loop)} a layer, {len(before) - 1} a step beside")
        print("  ", dict(collections.Counter(kind for *_, kind in in_loop)))
        if args.verbose:
            for operation, shape, _ in in_loop:
                print("  ", operation, shape[:90])


def _packed(out, certificate, plan):
    return out, (certificate.packed(), plan)


def kernels_of(text: str, start: str) -> list[tuple[str, str, str]]:
    """Name, shape and kind of the operations of a computation that run on the device."""
    body = text[re.search(rf"^{re.escape(start)}", text, re.M).start() :]
    found = re.findall(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\(", body[: body.index("\n}")], re.M)
    return [x for x in found if x[2] not in NO_KERNEL]


if __name__ == "__main__":
    main()
