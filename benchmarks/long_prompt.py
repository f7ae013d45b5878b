"""A prompt of random tokens through an 8B LLaMA with random weights, encoded as it goes, and some certified steps after
it: `python -m benchmarks.long_prompt --contexts 8192,32768`, on a GPU.

What it takes of the device's memory, beside `benchmarks.prefill_memory`'s account of it, and whether dense decoding of
the same prompt finds the same tokens. Scores of random weights are all alike, so that most heads go dense.
"""

from __future__ import annotations

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from certjax import Policy, decode
from certjax.bench.step import LLAMA_3_1_8B
from certjax.models.llama.modeling import init_params
from certjax.sampling import Sampling

STEPS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", default="8192,32768")
    parser.add_argument("--backend", default="auto", help="of the policy")
    parser.add_argument("--out", help="write JSON here")
    args = parser.parse_args()
    config, policy = LLAMA_3_1_8B, Policy.budget(0.05, block_size=128, backend=args.backend)
    params = init_params(config, jax.random.key(0))
    rows = []
    for n in (int(x) for x in args.contexts.split(",")):
        tokens = jax.random.randint(jax.random.key(1), (1, n), 0, config.vocab_size)
        found = {}
        for mode in ("certified", "dense"):  # dense at last: its cache is larger
            began = time.perf_counter()
            fixed = config, mode, policy, Sampling()
            state = jax.block_until_ready(
                decode.start(*fixed, n + 128, STEPS, params, tokens, jnp.array([n]), jax.random.key(2))
            )
            row = {"context": n, "mode": mode, "prefill_s": round(time.perf_counter() - began, 2)}
            row["peak_GB"] = round((jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9, 2)
            row["memory_kinds"] = sorted({x.sharding.memory_kind for x in jax.tree.leaves(state.cache)})
            began = time.perf_counter()
            state = jax.block_until_ready(decode.run(*fixed, params, state, jnp.int32(STEPS)))
            row["steps_s"] = round(time.perf_counter() - began, 2)
            found[mode] = np.asarray(state.tokens)
            if mode == "certified":
                telemetry = jax.device_get(state.telemetry)
                taken = telemetry.valid[:, 0]
                certificate = jax.tree.map(lambda x, taken=taken: x[taken], telemetry.certificate)
                row["rungs"] = np.bincount(certificate.rung.ravel(), minlength=5).tolist()
                row["worst_bound"] = float(np.where(certificate.rung < 3, certificate.e_total, 0.0).max())
                row["checks"] = bool(certificate.precondition_ok.all() and certificate.canary_ok.all())
            else:
                row["same_tokens"] = bool((found["dense"] == found["certified"]).all())
            del state
            rows.append(row)
            print(row, flush=True)
            if args.out:
                with open(args.out, "w") as f:
                    json.dump({"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": rows}, f)


if __name__ == "__main__":
    main()
