"""Where the time of a certified attention op goes on a GPU, kernel by kernel, from a profile:
`python -m benchmarks.phases --contexts 8192,32768 --out phases.json`.
"""

from __future__ import annotations

import argparse
import collections
import glob
import gzip
import json
import tempfile

import jax
import jax.numpy as jnp
from jax import lax

from certjax.attention import certified_layer, naive_layer
from certjax.bench import attention as bench
from certjax.bench import workloads

CALLS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", default="8192,32768,65536,131072")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--workload", default="concentrated", choices=workloads.WORKLOADS)
    parser.add_argument("--out", help="write JSON here")
    args = parser.parse_args()
    rows = []
    for n in map(int, args.contexts.split(",")):
        for mode in ("certified", "naive"):
            row = phases(mode, args.workload, args.batch, n)
            rows.append(row)
            print(f"{mode} at {n}: {row['busy_us']} us busy of {row['span_us']} a call, {row['kernels']} kernels")
            for name, (count, us) in row["by_kernel"].items():
                print(f"  {us:8.2f} us  {count:6.2f} x {name}", flush=True)
    if args.out:
        with open(args.out, "w") as f:
            json.dump({"device": str(jax.devices()[0].device_kind), "jax": jax.__version__, "rows": rows}, f, indent=1)


def phases(mode: str, kind: str, batch: int, n: int) -> dict:
    """Microseconds and launches a call, by kernel."""
    policy = bench.default_policy()
    q, k, v = bench._problem(kind, jax.random.key(0), batch, n, **bench.SHAPE)
    cache = jax.block_until_ready(bench._build(k, v, policy))
    attend = {
        "certified": lambda q, cache: certified_layer(q, cache, jnp.int32(0), policy)[0],
        "naive": lambda q, cache: naive_layer(q, cache, jnp.int32(0), policy),
    }[mode]

    @jax.jit
    def many(q, cache):
        return lax.scan(lambda q, _: (q + attend(q, cache).reshape(q.shape) * 1e-20, None), q, None, length=CALLS)[0]

    jax.block_until_ready(many(q, cache))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(many(q, cache))
        (path,) = glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)
        with gzip.open(path) as f:
            events = json.load(f)["traceEvents"]
    return {"mode": mode, "workload": kind, "batch": batch, "context": n} | _summary(events)


def _summary(events: list[dict]) -> dict:
    names = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    found = collections.defaultdict(lambda: [0, 0.0])
    first, last = float("inf"), 0.0
    for e in events:
        on_device = "GPU" in names.get(e.get("pid"), "") and "Stream" in threads.get((e.get("pid"), e.get("tid")), "")
        if e.get("ph") == "X" and on_device:
            entry = found[e["name"]]
            entry[0] += 1
            entry[1] += e["dur"]
            first, last = min(first, e["ts"]), max(last, e["ts"] + e["dur"])
    ranked = sorted(found.items(), key=lambda x: -x[1][1])
    return {
        "span_us": round((last - first) / CALLS, 2),
        "busy_us": round(sum(us for _, (_, us) in ranked) / CALLS, 2),
        "kernels": sum(count for _, (count, _) in ranked) / CALLS,
        "by_kernel": {name: (count / CALLS, round(us / CALLS, 2)) for name, (count, us) in ranked},
    }


if __name__ == "__main__":
    main()
