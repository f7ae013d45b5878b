"""Which back end attends: the one place that decides, and that says why."""

from __future__ import annotations

import importlib.util
import re

import jax

from certjax.cache import TieredKVCache
from certjax.codecs.planes import Planes
from certjax.errors import InvalidArgumentError
from certjax.fused.operands import TILE
from certjax.policy import Policy
from pallas_kernels.dispatch import PROCESSORS, Kernels, mosaic_kernels, reference_kernels, triton_kernels
from pallas_kernels.query import MAX_GROUP

COMPILED = ("mosaic_gpu", "triton")
"""Back ends whose big steps are kernels for a GPU."""

FUSED = (*COMPILED, "reference")
"""Back ends that run `certjax.fused`; "xla" is everything else, on any device."""

AMPERE, HOPPER = 8, 9
"""Major compute capabilities: the kernels need int8 and bfloat16 products, and those on Mosaic the matrix instructions
that Hopper has and no other."""


def pick_backend(
    policy: Policy, cache: TieredKVCache, n_query_heads: int, *, explain: bool = False
) -> str | tuple[str, str]:
    """The back end for a cache: where the kernels cover the policy "mosaic_gpu" on Hopper GPUs and "triton" on others
    from Ampere on, else "xla".

    Parameters
    ----------
    policy
        `policy.backend` overrides the choice: "xla", "mosaic_gpu", "triton", or "reference" for the kernels' `jnp`
        twins.
    cache
        Of one layer or stacked; concrete, traced, or of `ShapeDtypeStruct`.
    n_query_heads
        `Hq`.
    explain
        Return the reason beside the name.

    Raises
    ------
    InvalidArgumentError
        If `policy.backend` asks for kernels that do not cover the policy, the cache or the device.
    """
    obstacles = _obstacles(policy, cache, n_query_heads)
    wanted = policy.backend
    kernels = wanted if wanted in COMPILED else kernels_of_device()
    device = _device_obstacle(kernels)
    if wanted in FUSED:
        against = obstacles + ([device] if wanted in COMPILED and device else [])
        if against:
            raise InvalidArgumentError(f"backend={wanted!r} cannot be used: {'; '.join(against)}.")
        choice = wanted, "asked for by policy.backend"
    elif wanted == "xla":
        choice = "xla", "asked for by policy.backend"
    elif device or obstacles:
        choice = "xla", "; ".join(([device] if device else []) + obstacles)
    else:
        choice = kernels, f"a GPU of compute capability {_device()[1]}, and the kernels cover the policy"
    return choice if explain else choice[0]


def kernels_of(backend: str, n_heads: int) -> Kernels:
    """The kernels of a fused back end, for `n_heads` KV heads of all sequences together."""
    if backend == "triton":
        return triton_kernels(n_heads, getattr(jax.devices()[0], "core_count", PROCESSORS), _shared_memory())
    return mosaic_kernels(n_heads) if backend == "mosaic_gpu" else reference_kernels()


def chained(policy: Policy, kernels: Kernels) -> bool:
    """Whether what is between the kernels is kernels, too (`certjax.fused.chain`)."""
    return kernels.chained and policy.tolerance is not None


def kernels_of_device() -> str:
    """The back end that is made for the device, if any is."""
    return "mosaic_gpu" if _capability()[0] == HOPPER else "triton"


def _device() -> tuple[str, str]:
    """Platform and compute capability of the device."""
    device = jax.devices()[0]
    return device.platform, str(getattr(device, "compute_capability", ""))


def _capability() -> tuple[int, int]:
    """Compute capability of a GPU of NVIDIA's; 0, 0 of anything else."""
    found = re.fullmatch(r"(\d+)\.(\d+)", _device()[1])
    return tuple(int(x) for x in found.groups()) if found else (0, 0)


def _device_obstacle(kernels: str) -> str | None:
    platform, capability = _device()
    if platform != "gpu":
        return f"the device is a {platform}"
    major, _ = _capability()
    if major < AMPERE:
        return f"the GPU has compute capability {capability!r}, the kernels need NVIDIA's {AMPERE}.0 (Ampere) or newer"
    if kernels == "mosaic_gpu" and major != HOPPER:
        return f"the GPU has compute capability {capability!r}, the kernels on Mosaic need {HOPPER}.0 (Hopper)"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed, which `pip install certjax[gpu]` does"
    return None


def _shared_memory() -> int:
    """KB that the programs on a processor share (CUDA C++ Programming Guide, table of compute capabilities)."""
    return {(8, 0): 164, (8, 7): 164, (9, 0): 228, (10, 0): 228, (10, 3): 228}.get(_capability(), 100)


def _obstacles(policy: Policy, cache: TieredKVCache, n_query_heads: int) -> list[str]:
    """What the kernels do not cover."""
    codec, d, dtype = cache.codec, cache.head_dim, str(cache.ring_keys.dtype)
    group = n_query_heads // cache.ring_keys.shape[-3]
    covered = Planes()
    checks = (
        (codec == covered, "the codec is not `planes` with the widths and options of its defaults"),
        (cache.block_size == TILE, f"block_size is {cache.block_size}, the kernels read blocks of {TILE}"),
        (policy.kind != "paper", "the paper policy promotes key and value blocks apart"),
        (cache.note_form == "byte" and cache.spectral, "annotations are not bytes with spectral norms"),
        (policy.exploration == 0 and policy.ranking_depth == 0, "exploration and the ranking check are not there"),
        (d in (64, 128), f"head_dim is {d}, the kernels are for 64 and 128"),
        (group <= MAX_GROUP, f"{group} query heads share a KV head, the kernels take {MAX_GROUP}"),
        (dtype == "bfloat16", f"originals are {dtype}, the kernels read bfloat16 (kv_dtype of certjax.load)"),
    )  # fmt: skip
    return [reason for ok, reason in checks if not ok]
