"""How plans of the fused path come out on real activations, step after step: `python -m benchmarks.plans`.

SmolLM2 reads a novel; its last queries are attended with one after the other, all layers, on the kernels' twins. Each
step goes by the plans that the one before left (`certjax.fused.plan`).
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import certjax
from certjax.attention import certified_layer, common_to_layers
from certjax.bench.attention import default_policy
from certjax.capture import capture
from certjax.eval.texts import NOVELS, corpus
from certjax.fused.plan import REFRESH

POLICY = default_policy(backend="reference")
INTERVALS = (0, 1, 4, 16, 64, 256)


@jax.jit
def build(keys, values):
    """Full but for the tokens whose queries are to come."""
    lengths = jnp.full(1, keys.shape[-2], jnp.int32)
    return certjax.TieredKVCache.from_prefill(keys, values, POLICY, lengths=lengths, capacity=keys.shape[-2])


@jax.jit
def certify(q, cache):
    """`q`: [L, Hq, d]; certificate leaves [L, 1, Hq], the plans after it, and layers whose bound asked for a second
    pass [L]."""
    common = common_to_layers(cache, POLICY, q.shape[1])

    def visit(_, x):
        layer, q = x
        _, record, plan, _ = certified_layer(q[None], cache, layer, POLICY, common)
        return None, (record, plan)

    layers = jnp.arange(len(q), dtype=jnp.int32)
    _, (record, plan) = lax.scan(visit, None, (layers, q))
    return record, plan, (plan != cache.plan).any((1, 2, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--novel", choices=NOVELS, default="emma")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--queries", type=int, default=64)
    args = parser.parse_args()
    model = certjax.load("smollm2", kv_dtype="bfloat16")
    tokens = model.tokenizer.encode(corpus()[args.novel])[: args.tokens]
    seen = capture(model, tokens, n_queries=args.queries)
    cache, dense_bytes = build(seen.keys, seen.values), seen.keys.nbytes + seen.values.nbytes
    layers, rows = np.arange(len(seen.q)), []
    for i in range(args.queries):
        # Queries of different steps look at the same tokens; the length says whose turn it is to be planned anew.
        turn = cache.replace(length=cache.length - (args.queries - 1 - i) % REFRESH)
        record, plan, changed = certify(seen.q[:, i], turn)
        cache = cache.replace(plan=plan)
        missed = np.asarray(changed)[(int(turn.length[0]) + layers) % REFRESH != 0]
        read, paged = float(record.bytes_read.sum()), float(record.bytes_paged_in.sum())
        rows.append((missed.mean(), float((record.rung >= 3).mean()), read / dense_bytes, paged / dense_bytes))
    print("| steps | plans that did not hold | dense | bytes from the device, of dense | from the host |")
    print("|---|---|---|---|---|")
    for first, end in zip(INTERVALS, INTERVALS[1:], strict=False):
        if first < args.queries:
            missed, dense, read, paged = np.mean(rows[first:end], 0)
            steps = f"{first + 1} to {min(end, args.queries)}"
            print(f"| {steps} | {missed:.1%} | {dense:.2%} | {read:.3f} | {paged:.4f} |")


if __name__ == "__main__":
    main()
