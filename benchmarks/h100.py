"""Programs compiled for an H100, or a GPU of another kind, on a machine without one: how many kernels they become.

Needs JAX's CUDA plugin (`pip install jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc`), no driver and no device.
"""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"

import jax  # noqa: E402
from jax.experimental import topologies  # noqa: E402

SPEC = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { CAPABILITY }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def device(capability: str = "9.0") -> jax.Device:
    """An H100 that programs can be compiled for; or what has its memory and its number of processors, and another
    compute capability."""
    major, minor = capability.split(".")
    fields = f"major: {major} minor: {minor}" + " feature_extension: ACCELERATED_FEATURES" * (major == "9")
    spec = SPEC.replace("CAPABILITY", fields)
    (gpu,) = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=spec).devices
    return gpu


def on_device(tree, gpu: jax.Device):
    """Abstract arrays on it."""
    mesh = jax.sharding.Mesh([gpu], ("x",))
    at = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree)
