"""Tier 2's memory: where it lives, and how a piece of it gets back to the device.

JAX tracks the memory space of every array; an operation that mixes them is refused when traced. All
reads of tier 2 are therefore a `dynamic_slice` on the host array followed by a `device_put`, which XLA
turns into one copy of just that piece.

A cache whose policy says `tier2="device"` keeps tier 2 on the device, and has no use for this.
"""

from __future__ import annotations

import jax
import numpy as np
from jax import lax

PINNED = "pinned_host"
Space = jax.memory.Space


def host_memory_kind(device: jax.Device | None = None) -> str:
    """`"pinned_host"` where the device can address it, else its default memory kind."""
    device = device or jax.devices()[0]
    kinds = {m.kind for m in device.addressable_memories()}
    return PINNED if PINNED in kinds else device.default_memory().kind


def to_host(x: jax.Array, kind: str) -> jax.Array:
    """Move an array to tier 2's memory, inside jit or out."""
    return jax.device_put(x, Space.Host) if kind == PINNED else x


def in_host_memory(x: jax.Array) -> bool:
    """Whether an array, concrete or traced, lives in host memory by its type."""
    return jax.typeof(x).memory_space == Space.Host


def read(x: jax.Array, starts: tuple, sizes: tuple[int, ...]) -> jax.Array:
    """A piece of a tier-2 array, on the device."""
    piece = lax.dynamic_slice(x, starts, sizes)
    return jax.device_put(piece, Space.Device) if in_host_memory(x) else piece


def nbytes(*arrays: jax.Array | None) -> int:
    """Bytes of arrays (concrete, traced or ShapeDtypeStruct)."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in arrays if x is not None)
