"""How plans of the fused path come out on real activations, step after step: `python -m benchmarks.plans`.

SmolLM2 reads a novel; its last queries are attended with one after the other, all layers, on the kernels' twins. Each
step's certificates correct what the next plans aim at (`certjax.fused.aim`).
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import certjax
from certjax.bench.attention import default_policy
from certjax.capture import capture
from certjax.eval.texts import NOVELS, corpus
from certjax.fused.aim import corrected

POLICY = default_policy(backend="reference")
INTERVALS = (0, 1, 4, 16, 64, 256)


@jax.jit
def build(keys, values):
    lengths = jnp.full(1, keys.shape[-2], jnp.int32)

    def one(x):
        return certjax.TieredKVCache.from_prefill(*x, POLICY, lengths=lengths, capacity=keys.shape[-2])

    return jax.lax.map(one, (keys, values))


@jax.jit
def certify(q, caches):
    """`q`: [L, Hq, d]; certificate leaves [L, 1, Hq]."""
    return jax.lax.map(lambda x: certjax.certified_attention(x[0][None], x[1], POLICY)[1], (q, caches))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--novel", choices=NOVELS, default="emma")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--queries", type=int, default=64)
    args = parser.parse_args()
    model = certjax.load("smollm2", kv_dtype="bfloat16")
    tokens = model.tokenizer.encode(corpus()[args.novel])[: args.tokens]
    seen = capture(model, tokens, n_queries=args.queries)
    caches, dense_bytes = build(seen.keys, seen.values), seen.keys.nbytes + seen.values.nbytes
    rows = []
    for i in range(args.queries):
        record = certify(seen.q[:, i], caches)
        caches = corrected(caches, POLICY, record)
        read, paged = float(record.bytes_read.sum()), float(record.bytes_paged_in.sum())
        rows.append((float((record.rung >= 3).mean()), read / dense_bytes, paged / dense_bytes))
    print("| steps | dense | bytes from the device, of dense | from the host |\n|---|---|---|---|")
    for first, end in zip(INTERVALS, INTERVALS[1:], strict=False):
        if first < args.queries:
            dense, read, paged = np.mean(rows[first:end], 0)
            print(f"| {first + 1} to {min(end, args.queries)} | {dense:.2%} | {read:.3f} | {paged:.4f} |")
    aims = np.sort(np.asarray(caches.aim).ravel())
    print(f"aims at the end: {aims[0]:.2f} to {aims[-1]:.2f}, median {np.median(aims):.2f}")


if __name__ == "__main__":
    main()
