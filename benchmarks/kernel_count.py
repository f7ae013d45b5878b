"""How many GPU kernels one fused step is, without a GPU: `python -m benchmarks.kernel_count --context 65536`.

Compiles ahead of time for an H100. Needs JAX's CUDA plugin (`pip install jax-cuda13-plugin jax-cuda13-pjrt
nvidia-cuda-nvcc`), no driver and no device.
"""

from __future__ import annotations

import argparse
import collections
import os
import re

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from certjax import Policy, TieredKVCache  # noqa: E402
from certjax.bench.attention import SHAPE  # noqa: E402
from certjax.fused.attention import fused_attention, fused_naive  # noqa: E402
from pallas_kernels.dispatch import mosaic_kernels  # noqa: E402

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

NO_KERNEL = ("parameter", "get-tuple-element", "bitcast", "tuple", "constant")


def shapes(tree, device):
    """Abstract arrays on a device that need not exist."""
    mesh = jax.sharding.Mesh([device], ("x",))
    at = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=65536)
    parser.add_argument("--verbose", action="store_true", help="list the kernels")
    args = parser.parse_args()
    (device,) = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H100).devices
    policy, heads, group, d = Policy.budget(0.05, block_size=128), *SHAPE.values()
    originals = jax.ShapeDtypeStruct((1, 1, heads, args.context, d), jnp.bfloat16)
    cache = jax.eval_shape(
        lambda k, v: TieredKVCache.from_prefill(k, v, policy, capacity=args.context), originals, originals
    )
    q = jax.ShapeDtypeStruct((1, heads, group, d), jnp.float32)
    kernels = mosaic_kernels(heads)
    functions = {
        "certified": lambda q, c: fused_attention(q, c, jnp.int32(0), policy, kernels, jnp.ones(1, bool)),
        "naive": lambda q, c: fused_naive(q, c, jnp.int32(0), policy, kernels),
    }
    for name, f in functions.items():
        text = jax.jit(f).trace(*shapes((q, cache), device)).lower().compile().as_text()
        found = re.findall(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\(", text[text.index("ENTRY") :], re.M)
        found = [x for x in found if x[2] not in NO_KERNEL]
        print(name, len(found), dict(collections.Counter(kind for *_, kind in found)))
        if args.verbose:
            for operation, shape, _ in found:
                print("  ", operation, shape[:90])


if __name__ == "__main__":
    main()
