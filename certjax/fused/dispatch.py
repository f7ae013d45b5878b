"""Which back end attends: the one place that decides, and that says why."""

from __future__ import annotations

import jax

from certjax.cache import TieredKVCache
from certjax.codecs.planes import Planes
from certjax.errors import InvalidArgumentError
from certjax.fused.operands import TILE
from certjax.policy import Policy
from pallas_kernels.dispatch import Kernels, mosaic_kernels, reference_kernels
from pallas_kernels.query import MAX_GROUP

FUSED = ("mosaic_gpu", "reference")
"""Back ends that run `certjax.fused`; "xla" is everything else, on any device."""


def pick_backend(
    policy: Policy, cache: TieredKVCache, n_query_heads: int, *, explain: bool = False
) -> str | tuple[str, str]:
    """The back end for a cache: "mosaic_gpu" on Hopper GPUs where the kernels cover the policy, else "xla".

    Parameters
    ----------
    policy
        `policy.backend` overrides the choice: "xla", "mosaic_gpu", or "reference" for the kernels' `jnp` twins.
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
    device = _device_obstacle()
    wanted = policy.backend
    if wanted in FUSED:
        against = obstacles + ([device] if wanted == "mosaic_gpu" and device else [])
        if against:
            raise InvalidArgumentError(f"backend={wanted!r} cannot be used: {'; '.join(against)}.")
        choice = wanted, "asked for by policy.backend"
    elif wanted == "xla":
        choice = "xla", "asked for by policy.backend"
    elif device or obstacles:
        choice = "xla", "; ".join(([device] if device else []) + obstacles)
    else:
        choice = "mosaic_gpu", "a Hopper GPU, and the kernels cover the policy"
    return choice if explain else choice[0]


def kernels_of(backend: str, n_heads: int) -> Kernels:
    """The kernels of a fused back end, for `n_heads` KV heads of all sequences together."""
    return mosaic_kernels(n_heads) if backend == "mosaic_gpu" else reference_kernels()


def chained(policy: Policy, kernels: Kernels) -> bool:
    """Whether what is between the kernels is kernels, too (`certjax.fused.chain`)."""
    return kernels.chained and policy.tolerance is not None


def _device_obstacle() -> str | None:
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    if device.platform != "gpu":
        return f"the device is a {device.platform}"
    if not capability.startswith("9."):
        return f"the GPU has compute capability {capability}, the kernels need 9.0 (Hopper)"
    return None


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
        (dtype == "bfloat16", f"originals are {dtype}, the kernels read bfloat16"),
    )  # fmt: skip
    return [reason for ok, reason in checks if not ok]
