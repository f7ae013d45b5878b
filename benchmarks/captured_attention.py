"""The attention op on real activations, tiled to long contexts, as `certjax bench attention` times it.

`python -m benchmarks.captured_attention make FILE.npz` captures layers of SmolLM2 where the model is;
`python -m benchmarks.captured_attention run FILE.npz --out captured.json` times them where the GPU is.

A context of 32K is the text's 8,192 tokens four times over. Each sequence of a batch has another of the last queries.
Sequences are attended to by the plan that steps with the queries before leave them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import certjax
from certjax.bench import attention as bench
from certjax.bench import report
from certjax.capture import capture
from certjax.eval.texts import corpus

POLICY = bench.default_policy()
TOKENS, LAYERS, QUERIES = 8192, (2, 8, 20), 16


def make(path: str) -> None:
    model = certjax.load("smollm2", kv_dtype="bfloat16")
    seen = capture(model, model.tokenizer.encode(corpus()["emma"])[:TOKENS], n_queries=QUERIES)
    bits = [np.asarray(x).view(np.uint16)[list(LAYERS), 0] for x in (seen.keys, seen.values)]  # [layers, Hkv, N, d]
    np.savez_compressed(path, q=np.asarray(seen.q)[list(LAYERS)], keys=bits[0], values=bits[1])


def run(path: str, contexts: list[int], batch: int, out: str | None) -> None:
    file = np.load(path)
    rows = []
    for n in contexts:
        for i, layer in enumerate(LAYERS):
            before, q = jnp.asarray(file["q"][i, -2 * batch : -batch]), jnp.asarray(file["q"][i, -batch:])
            k, v = (tiled(file[name][i], n, batch) for name in ("keys", "values"))
            baseline = bench.time_dense(q, *(x.swapaxes(1, 2) for x in (k, v)), loops=9)
            cache = bench.build(k, v, POLICY)
            cache = bench.settled(before, cache, POLICY)
            rows.append(bench.time_certified(f"captured, layer {layer}", q, cache, POLICY, baseline, loops=9))
            print(rows[-1]["workload"], n, rows[-1]["certified_over_dense"], flush=True)
            if out:
                payload = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": rows}
                Path(out).write_text(json.dumps(payload, indent=1) + "\n")
    print(report.attention_table(rows))


def tiled(bits: np.ndarray, n: int, batch: int) -> jax.Array:
    """`[Hkv, N, d]` of bfloat16 -> `[batch, Hkv, n, d]`."""
    x = jnp.tile(jnp.asarray(bits).view(jnp.bfloat16), (1, n // bits.shape[1], 1))
    return jnp.broadcast_to(x, (batch, *x.shape)).copy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("make", "run"))
    parser.add_argument("file")
    parser.add_argument("--contexts", default="32768,65536")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", help="write JSON here")
    args = parser.parse_args()
    if args.what == "make":
        make(args.file)
    else:
        run(args.file, [int(n) for n in args.contexts.split(",")], args.batch, args.out)


if __name__ == "__main__":
    main()
