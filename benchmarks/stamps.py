"""What a program of the kernel of the first pass does when, by the processors' clocks:
`python -m benchmarks.stamps --contexts 32768,131072`, on a GPU.

Runs copies of the kernel's sources with stamps at the lines of `STAMPS`; a line that is there no longer is an error.
Every third tile is at level 1, and of a head nothing else, one tile at its finest, one piece from the host, or both;
once as it is, and once after half a gigabyte of weights has gone by.
"""

from __future__ import annotations

import argparse
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, memref
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

import pallas_kernels
from certjax.attention import common_to_layers
from certjax.bench import attention as bench
from certjax.fused import operands as ops
from pallas_kernels import dispatch
from pallas_kernels import levels as lv

N = 32
"""Stamps of a program. The first two are when it begins, in nanoseconds and in cycles, the last two when it ends."""

BEGIN, BEGIN_CYCLES, END, END_CYCLES = 0, 1, 30, 31

STAMPS = {
    "originals": [
        ("host: queries", "after", "        plgpu.copy_gmem_to_smem(summary_ref.at[h], summary, barrier)\n"
         "        load_exact_queries(h, q_ref, numbers_ref, queries, numbers, barrier)\n"
         "        plgpu.barrier_wait(barrier)\n"),
        ("host: listed", "before", "        for tile in (keys, values):  # a product takes HALF rows"),
        ("host: read", "before", "            unit, shift = (mg.over_rows(numbers[i], HALF) for i in (UNIT_EXACT, "
         "SHIFT_EXACT))\n            those"),
        ("host: attended", "before", "        store_rows(rest, sums, sums_ref.at[h, part])"),
    ],
    "fine": [
        ("fine: queries", "after", "        plgpu.barrier_wait(queries_ready)\n"),
        ("fine: listed", "before", "        def attend_keys("),
        ("fine: read", "after", "            plgpu.barrier_wait(ready)\n"),
        ("fine: keys", "before", "            plgpu.wait_smem_to_gmem(0, wait_read_only=True)\n"
         "            for i, x in enumerate(found)"),
        ("fine: values", "after", "            plgpu.commit_smem()  # a barrier: no warp is at the tile any more\n"),
    ],
    "scan": [
        ("queries", "before", "            for plane in planes:\n                fetch_values(plane, jnp.int32(0))"),
        *[(f"tile {tile}", tile, "                plgpu.barrier_wait(ready.at[slot])\n") for tile in range(4)],
        ("first: scored", 0, "                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the parity's"),
        ("first: summed", 0, "                mg.store_weights(scaled, weights.at[parity])\n"),
        ("first: stored", 0, "                level = level_of(mg.flag_of(flags, tile))\n"),
        ("first: values", 0, "                return acc\n\n            acc = lax"),
        ("tiles", "before", "            store_parts(acc, out, values_ref.at[h, split])\n"
         "            plgpu.wait_smem_to_gmem(0)\n\n        def without"),
    ],
}  # fmt: skip
"""Of each module: what has been done, and where; a number is the visit in which it is stamped, before the line."""

NAMES = [name for places in STAMPS.values() for name, *_ in places]


def stamp(place: int, what=utils.clock) -> None:
    """In a kernel: write down the time."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def store(ctx, stamps):
        memref.store(what(), stamps, [arith.constant(ir.IndexType.get(), place)])

    store(stamp.here)


def stamped() -> types.ModuleType:
    """`pallas_kernels.scan.mosaic` whose kernel returns what its programs stamped, too: `[H, programs, N]` int32."""
    modules = {}
    for module in STAMPS:  # each imports those before it
        source = (Path(pallas_kernels.__file__).parent / module / "mosaic.py").read_text()
        for name, where, line in STAMPS[module]:
            source = _put(source, name, where, line)
        if module == "scan":
            source = _with_result(source)
        for other in modules:
            source = source.replace(f"pallas_kernels.{other}.mosaic", f"stamped_{other}")
        copy = types.ModuleType(f"stamped_{module}")
        copy.__dict__.update(stamp=stamp, utils=utils, N=N)
        sys.modules[copy.__name__] = modules[module] = copy
        exec(compile(source, f"{module}/mosaic.py, stamped", "exec"), copy.__dict__)
    return modules["scan"]


def _put(source: str, name: str, where: str | int, line: str) -> str:
    assert source.count(line) == 1, f"{name}: {line!r} is there {source.count(line)} times"
    indent, call = line[: len(line) - len(line.lstrip())], f"stamp({2 + NAMES.index(name)})"
    if where == "after":
        return source.replace(line, f"{line}{indent}{call}\n")
    if where == "before":
        return source.replace(line, f"{indent}{call}\n{line}")
    call = f"{indent}pl.when(i == {where})(lambda: {call})\n"
    return source.replace(line, line + call if "barrier_wait" in line else call + line)


def _with_result(source: str) -> str:
    for line, other in (
        ("        stats_ref, weights_ref, values_ref, acc_ref, sums_ref, *found_refs = refs\n",
         "        *refs, stamps_ref, stamp.here = refs\n"
         f"        stamp({BEGIN}, lambda: utils.globaltimer('low'))\n        stamp({BEGIN_CYCLES})\n{{}}"),
        ("    run = plgpu.kernel(\n",
         f"        stamp({END_CYCLES})\n        stamp({END}, lambda: utils.globaltimer('low'))\n"
         "        plgpu.commit_smem()\n"
         "        plgpu.copy_smem_to_gmem(stamp.here, stamps_ref.at[h, split])\n"
         "        plgpu.wait_smem_to_gmem(0)\n\n{}"),
        ("            *(results(heads, n, d, columns, refiners, readers) if fine else ()),\n",
         "{}            jax.ShapeDtypeStruct((heads, splits + len(places), N), jnp.int32),\n"),
        ('        kernel_name="scan_tiles",\n', "{}        scratch_types=[plgpu.SMEM((N,), jnp.int32)],\n"),
    ):  # fmt: skip
        assert source.count(line) == 1, line
        source = source.replace(line, other.format(line))
    return source


def program(scan: types.ModuleType):
    """A jitted function of queries, a cache and what its layers share; and how many programs of a head scan."""
    options = dispatch.mosaic_kernels(bench.SHAPE["n_kv_heads"]).scan_and_fine.keywords

    def call(q, cache, common):
        x, (heads, group, d) = ops.layer_of(cache, jnp.int32(0), common), bench.SHAPE.values()
        queries = ops.prepare(q.reshape(heads, group, d), x).kernel
        rest = x.key_scale, x.values, x.values_low, x.value_scale, x.nu, x.live, x.windows
        fine = x.counts, x.summary, x.keys_low, x.host_keys, x.host_values
        scanned, found = scan.scan_and_fine(x.index, x.meta, x.words, queries, x.keys, *rest, fine=fine, **options)
        return found[-1], scanned, found[:-1]

    return jax.jit(call), options["splits"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", default="32768,131072")
    parser.add_argument("--runs", type=int, default=10)
    args = parser.parse_args()
    policy, scan = bench.default_policy(), stamped()
    weights = jax.random.normal(jax.random.key(1), (4096, 57344), jnp.bfloat16)
    flush = jax.jit(lambda x, w: jnp.dot(x, w))
    x = jnp.ones((8, 4096), jnp.bfloat16)
    shared = jax.jit(common_to_layers, static_argnums=(1, 2))
    for n in (int(x) for x in args.contexts.split(",")):
        q, k, v = bench._problem("concentrated", jax.random.key(0), 1, n, **bench.SHAPE)
        cache, (run, splits) = bench.build(k, v, policy), program(scan)
        piece = lv.word(lv.PROMOTED, 1)
        for name, tiles in {
            "nothing else": {}, "a tile at its finest": {20: lv.FINEST}, "a piece from the host": {20: piece},
            "both": {20: piece, 40: lv.FINEST},
        }.items():  # fmt: skip
            plan = np.zeros(cache.plan.shape, np.uint16)
            plan[..., ::3] = lv.COARSE
            for tile, word in tiles.items():
                plan[..., tile] = word
            planned = cache.replace(plan=jnp.asarray(plan))
            common = shared(planned, policy, q.shape[1])
            for cold in (False, True):
                found = []
                for _ in range(args.runs + 2):
                    if cold:
                        flush(x, weights)
                    found.append(np.asarray(run(q, planned, common)[0]).astype(np.int64))
                print(f"{n}, {name}{', after weights' if cold else ''}:")
                report(np.stack(found[2:]), splits)


def report(found: np.ndarray, splits: int) -> None:
    """`found`: `[runs, H, programs, N]`."""
    begin, end = found[..., BEGIN], found[..., END]
    first = begin.min((1, 2))
    total, mean = (end.max((1, 2)) - first) / 1e3, (end[:, :, :splits].mean((1, 2)) - first) / 1e3
    print(f"  {np.median(total):.1f} us ({total.min():.1f} to {total.max():.1f}); a scanning program ends after "
          f"{np.median(mean):.1f} on average")  # fmt: skip
    cycles = found[..., 2 : 2 + len(NAMES)] - found[..., BEGIN_CYCLES, None]
    elapsed = found[..., END_CYCLES] - found[..., BEGIN_CYCLES]
    rate = np.median(elapsed / np.maximum(end - begin, 1))  # cycles a nanosecond
    for label, programs in (("first", [0]), ("middle", slice(splits // 4, 3 * splits // 4)), ("last", [splits - 1])):
        us = cycles[:, :, programs] / rate / 1e3
        stamped = {name: us[..., i][(us[..., i] > 0) & (us[..., i] < 1000)] for i, name in enumerate(NAMES)}
        often = us[..., 0].size // 4  # what was not stamped is anything
        print(f"  {label}: " + "; ".join(f"{x} {np.median(y):.1f}" for x, y in stamped.items() if y.size > often))


if __name__ == "__main__":
    main()
