"""One kernel at a time, at many settings, without compiling anything on the GPU machine.

`python -m benchmarks.pieces compile DIR` compiles for an H100 on a machine without one (see `benchmarks/h100.py` for
what that needs); `python -m benchmarks.pieces run DIR` runs what is in DIR on a GPU, with JAX of the same version, and
prints the median microseconds of eight runs, from a profile. Inputs are random: enough to choose between settings.
"""

from __future__ import annotations

import argparse
import collections
import glob
import gzip
import itertools
import json
import pickle
import tempfile
from pathlib import Path

CONTEXTS, HEADS, GROUP, D = (32768, 131072), 8, 4, 128
RUNS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("compile", "run"))
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    (compile_into if args.what == "compile" else run_from)(args.directory)


def compile_into(directory: Path) -> None:
    from benchmarks import h100  # isort: skip  # first: it says which platform JAX runs on
    import jax
    from jax.experimental.serialize_executable import serialize

    for name, f, arguments in (x for n in CONTEXTS for x in itertools.chain(_triton(n), _mosaic(n))):
        program = jax.jit(f).trace(*h100.on_device(arguments, h100.device())).lower().compile()
        shapes = [(x.shape, str(x.dtype)) for x in jax.tree.leaves(arguments)]
        (directory / f"{name}.bin").write_bytes(pickle.dumps((serialize(program), shapes)))
        print(name, flush=True)


def _triton(n: int):
    """Every Triton kernel of the chain, with the arguments it has there, at other numbers of warps."""
    import functools

    import jax
    import jax.numpy as jnp

    from certjax import TieredKVCache
    from certjax.bench.attention import default_policy
    from certjax.fused.chain import chained_attention
    from pallas_kernels import dispatch, launch
    from pallas_kernels.coarse import triton as coarse
    from pallas_kernels.fine import triton as fine
    from pallas_kernels.judge import dense
    from pallas_kernels.judge import triton as judging
    from pallas_kernels.plan import triton as planning
    from pallas_kernels.prepare import triton as preparing

    calls, shape = [], jax.ShapeDtypeStruct

    def record(kernel, *arrays, warps=4, **rest):
        calls.append((kernel, [shape(x.shape, x.dtype) for x in arrays], rest))
        return launch.launch(kernel, *arrays, warps=warps, **rest)

    policy, originals = default_policy(), shape((1, HEADS, n, D), jnp.bfloat16)
    cache = jax.eval_shape(
        lambda k, v: TieredKVCache.from_prefill(k[None], v[None], policy, capacity=n), originals, originals
    )
    modules = judging, dense, planning, preparing, coarse, fine
    for module in modules:
        module.launch = record
    jax.eval_shape(
        lambda q, c: chained_attention(
            q, c, jnp.int32(0), policy, dispatch.mosaic_kernels(HEADS), jnp.ones(1, bool)
        ),
        shape((1, HEADS, GROUP, D), jnp.float32), cache,
    )  # fmt: skip
    for module in modules:
        module.launch = launch.launch
    for (kernel, arrays, rest), warps in itertools.product(calls, (2, 4, 8)):
        yield f"{kernel.__name__}-w{warps}-{n}", functools.partial(launch.launch, kernel, warps=warps, **rest), arrays


def _mosaic(n: int):
    """The scan, at other numbers of programs and of tiles in flight."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import query as qr
    from pallas_kernels.scan import mosaic as scan

    def of(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    q = qr.Operands(
        of(jnp.int8, HEADS, 3, 8, D), of(jnp.bfloat16, HEADS, 6, 8, D), of(jnp.float32, HEADS, qr.NUMBERS, 8)
    )  # fmt: skip
    scale, windows = of(jnp.bfloat16, 1, HEADS, n), (of(jnp.bfloat16, 1, HEADS, 128, D),) * 2
    arguments = (
        of(jnp.int32, 1), of(jnp.int32, HEADS, 3), of(jnp.int32, HEADS, n // 128), q, of(jnp.int8, 1, HEADS, n, D),
        scale, of(jnp.int8, 1, HEADS, n // 128, D, 64), of(jnp.int8, 1, HEADS, n // 128, D, 32), scale,
        of(jnp.uint8, 1, HEADS, n), of(jnp.int32, HEADS, 1), windows,
    )  # fmt: skip
    for stages, splits in ((2, 46), (2, 30), (3, 30), (2, 94), (2, 62)):
        scan.STAGES = stages
        yield f"scan_tiles-{stages}x{splits}-{n}", lambda *x, s=splits: scan.scan_tiles(*x, splits=s), arguments


def run_from(directory: Path) -> None:
    import jax
    import jax.experimental.pallas.mosaic_gpu  # loads what Mosaic's kernels call  # noqa: F401
    import numpy as np
    from jax.experimental.serialize_executable import deserialize_and_load

    device = jax.devices()[:1]
    place = jax.sharding.NamedSharding(jax.sharding.Mesh(device, ("x",)), jax.sharding.PartitionSpec())
    runs = []
    for path in sorted(directory.glob("*.bin")):
        payload, shapes = pickle.loads(path.read_bytes())
        f = deserialize_and_load(*payload, execution_devices=device)
        leaves = [jax.device_put(_random(*x, int(path.stem.split("-")[-1])), place) for x in shapes]
        runs.append((path.stem, f, jax.tree.unflatten(f.in_tree, leaves)[0]))
        jax.block_until_ready(f(*runs[-1][2]))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _, f, arguments in runs:
                jax.block_until_ready([f(*arguments) for _ in range(RUNS)])
        (path,) = glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)
        with gzip.open(path) as file:
            events = json.load(file)["traceEvents"]
    gpu = {e["pid"] for e in events if e.get("name") == "process_name" and "GPU" in e["args"]["name"]}
    found = collections.defaultdict(list)
    for e in sorted((e for e in events if e.get("ph") == "X" and e["pid"] in gpu), key=lambda e: e["ts"]):
        found[e["name"]].append(e["dur"])
    for name, *_ in runs:
        key = next(k for k in found if k.startswith(name.split("-")[0]))
        durations, found[key] = found[key][:RUNS], found[key][RUNS:]
        print(f"{np.median(durations):8.2f} us  {name}")


def _random(shape, dtype: str, n: int):
    """Of the first tiles, as the kernels know them by their shapes: layer 0, all tiles active, windows full."""
    import jax.numpy as jnp
    import numpy as np

    from pallas_kernels import levels as lv

    rng, tiles = np.random.default_rng(0), n // 128
    # Every head is asked to be judged once more.
    known = {
        (1,): 0, (HEADS,): 2, (HEADS, 3): [1, tiles - 2, n], (HEADS, 1): 128,
        (HEADS, lv.COUNTS): [tiles - 3, tiles // 2, *[0] * (lv.COUNTS - 2)],
    }  # fmt: skip
    if tuple(shape) == (HEADS, tiles):  # a plan: as many values are read as of concentrated scores
        return (rng.random(shape) < {256: 0.12, 1024: 0.62}.get(tiles, 0.3)).astype(np.int32)
    if dtype == "int32":
        return np.broadcast_to(np.int32(known.get(tuple(shape), 1)), shape).copy()
    if dtype in ("int8", "uint8"):
        return rng.integers(0, 127, shape).astype(dtype)
    return jnp.asarray(rng.uniform(0.01, 0.1, shape), dtype)


if __name__ == "__main__":
    main()
