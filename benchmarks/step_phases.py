"""Where the time of a whole decode step goes on a GPU, kernel by kernel, and what the host does meanwhile:
`python -m benchmarks.step_phases --contexts 131072,32768 --modes certified,naive,dense --out step_phases.json`.

The steps that `certjax bench step` times, under JAX's profiler.
"""

from __future__ import annotations

import argparse
import json

import jax
import jax.numpy as jnp

from benchmarks import traces
from certjax.bench import step
from certjax.bench.attention import default_policy
from certjax.cli.common import use_compilation_cache
from certjax.models.llama.modeling import init_params

CONFIG, POLICY = step.LLAMA_3_1_8B, default_policy()
SHOWN = 24
"""Kernels that are printed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", default="131072,32768")
    parser.add_argument("--modes", default="certified,naive,dense")
    parser.add_argument("--out", help="write JSON here")
    args = parser.parse_args()
    use_compilation_cache()  # the programs are those of `certjax bench step`
    params = init_params(CONFIG, jax.random.key(0))
    payload = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": []}
    for n in (int(x) for x in args.contexts.split(",")):
        for mode in args.modes.split(","):
            row = {"context": n, "mode": mode, **profile(params, n, mode)}
            payload["rows"].append(row)
            print(f"{mode} at {n}: {row['ms']} ms a step, of which the profile has {row['span_us']} us, "
                  f"{row['busy_us']} busy, {row['kernels']} kernels")  # fmt: skip
            for name, (count, us) in list(row["by_kernel"].items())[:SHOWN]:
                print(f"  {us:9.2f} us  {count:7.2f} x {name[:110]}")
            print(f"  the host: {row['host_waits']}", flush=True)
            if args.out:
                with open(args.out, "w") as f:
                    json.dump(payload, f, indent=1)


def profile(params, n: int, mode: str) -> dict:
    """Of `step.STEPS` steps at a context, after those that are timed."""
    if mode == "dense":
        cache = step.dense_cache(CONFIG, n, 1)
    else:
        cache = step.tiered_cache(CONFIG, POLICY, "concentrated", params, n, 1, jax.random.key(1))
    arguments = CONFIG, mode, POLICY, step.STEPS, params
    times, cache, _ = step.timed(CONFIG, mode, POLICY, params, cache, n)
    found = traces.events(step.many, *arguments, cache, jnp.int32(n))
    return {"ms": times, **traces.by_kernel(found, step.STEPS), "host_waits": traces.host_waits(found, step.STEPS)}


if __name__ == "__main__":
    main()
