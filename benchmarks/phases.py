"""Where the time of a certified attention op goes on a Hopper GPU, kernel by kernel:
`python -m benchmarks.phases --contexts 8192,32768,65536,131072 --out phases.json`.

What `certjax bench attention` times, and a profile of it. All contexts are compiled at once, as that takes most of the
time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import traces
from certjax.attention import certified_layer, common_to_layers
from certjax.bench import attention as bench
from certjax.bench import timing, workloads
from certjax.certificate import Certificate
from certjax.policy import Policy
from certjax.programs import accepted

CALLS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", default="8192,32768,65536,131072")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--workloads", default="concentrated")
    parser.add_argument("--backend", default="auto", help="of the policy: mosaic_gpu, triton")
    parser.add_argument("--out", help="write JSON here")
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error("needs a GPU: it times kernels there.")
    policy = dataclasses.replace(bench.default_policy(), backend=args.backend)
    contexts, kinds = [int(n) for n in args.contexts.split(",")], args.workloads.split(",")
    if unknown := set(kinds) - set(workloads.WORKLOADS):
        parser.error(f"--workloads: unknown {', '.join(unknown)}; choose from {', '.join(workloads.WORKLOADS)}.")
    with ThreadPoolExecutor(len(contexts)) as pool:
        programs = list(pool.map(lambda n: compiled(args.batch, n, policy), contexts))
    payload = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": []}
    for n, (build, certified) in zip(contexts, programs, strict=True):
        for row in rows(n, args.batch, kinds, policy, build, certified):
            payload["rows"].append(row)
            print(f"{row['workload']} at {n}: {row['certified_us']['p50']} us, {row['certified_over_dense']}x dense; "
                  f"planned anew {row['planned_anew_us']['p50']} us")  # fmt: skip
            for kind in ("profile", "profile_planned_anew"):
                p = row[kind]
                print(f" {kind}: {p['busy_us']} us busy, {p['kernels']} kernels")
                for name, (count, us) in p["by_kernel"].items():
                    print(f"  {us:8.2f} us  {count:6.2f} x {name}", flush=True)
            if args.out:
                with open(args.out, "w") as f:
                    json.dump(payload, f, indent=1)


def many(q, cache, common, policy):
    """CALLS steps by one plan, each of which waits for the one before; what they return is stored."""

    def step(q, _):
        out, certificate, plan, _ = certified_layer(q, cache, jnp.int32(0), policy, common)
        return q + out.reshape(q.shape) * 1e-20, (certificate.packed(), plan)

    q, (certificates, plans) = lax.scan(step, q, None, length=CALLS)
    return q, certificates[-1], plans[-1]


def compiled(batch: int, n: int, policy: Policy):
    """Programs that build a cache and that attend to it."""
    device = jax.devices()[0]

    def at(x, kind="device", **space):
        sharding = jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding, **space)

    heads, group, d = bench.SHAPE.values()
    originals = at(jax.ShapeDtypeStruct((batch, heads, n, d), jnp.bfloat16))
    build = bench.build.lower(originals, originals, policy)
    cache = jax.eval_shape(lambda k, v: bench.build(k, v, policy), originals, originals)
    common = jax.tree.map(at, jax.eval_shape(lambda c: common_to_layers(c, policy, heads * group), cache))
    # There is no public way to say that an argument to come is in host memory.
    host = [at(x, "pinned_host", _memory_space=jax.memory.Space.Host) for x in (cache.host_keys, cache.host_values)]
    cache = jax.tree.map(at, cache).replace(host_keys=host[0], host_values=host[1])
    q = at(jax.ShapeDtypeStruct((batch, heads * group, d), jnp.float32))
    loop = jax.jit(many, static_argnames="policy", compiler_options=accepted())
    return build.compile(), loop.lower(q, cache, common, policy).compile()


def rows(n: int, batch: int, kinds: list[str], policy: Policy, build, certified):
    baseline = None
    for kind in kinds:
        q, k, v = bench._problem(kind, jax.random.key(0), batch, n, **bench.SHAPE)
        if baseline is None:
            kd, vd = (jax.block_until_ready(x.swapaxes(1, 2)) for x in (k, v))
            baseline = bench.time_dense(q, kd, vd, loops=9)
            del kd, vd
        cache = build(k, v)
        shared = jax.jit(common_to_layers, static_argnums=(1, 2))
        for _ in range(3):  # as `bench.settled`
            cache = cache.replace(plan=certified(q, cache, shared(cache, policy, q.shape[1]))[2][None])
        forgot = bench.forgetful(cache)
        arguments, anew = ((q, c, shared(c, policy, q.shape[1])) for c in (cache, forgot))
        certificate = jax.device_get(Certificate.unpacked(certified(*arguments)[1][None]))
        figures = _times(certified, *arguments)
        best = min(x["p50"] for x in baseline.values())
        sizes, dense_bytes = cache.nbytes(), 2 * k.nbytes
        yield {
            "context": n, "batch": batch, "workload": kind, "dense_us": baseline, "certified_us": figures,
            "planned_anew_us": _times(certified, *anew),
            "certified_over_dense": round(figures["p50"] / best, 3), "dense_bytes": dense_bytes,
            "bytes_read": float(certificate.bytes_read.sum()),
            "bytes_paged_in": float(certificate.bytes_paged_in.sum()),
            "device_bytes_over_dense": round((sizes["tier1"] + sizes["windows"]) / dense_bytes, 4),
            "rungs": np.bincount(certificate.rung.ravel(), minlength=5).tolist(),
            "tiles_skipped": float(certificate.n_value_skipped.mean()),
            "tiles_finest": float(certificate.n_key_refined.mean()),
            "tiles_promoted": float(certificate.k_star.mean()),
            "profile": _profile(certified, *arguments),
            "profile_planned_anew": _profile(certified, *anew),
        }  # fmt: skip


def _times(f, *arguments) -> dict[str, float]:
    return timing.quantiles(timing.of_loop(f, *arguments, calls=CALLS, loops=9))


def _profile(f, *arguments) -> dict[str, Any]:
    """By kernel. Of a loop that is the device's own, the profiler sees one call."""
    found = traces.events(f, *arguments)
    return traces.by_kernel(found, sum(e["name"] == "_judge" for e in traces.on_device(found)))


if __name__ == "__main__":
    main()
