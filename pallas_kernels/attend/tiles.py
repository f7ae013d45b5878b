"""Twin of `attend/mosaic.py`: the values of chosen tiles at their coarsest."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.query import folded, whole

TILE = 128
COARSE, FINEST, PROMOTED = 1, 2, 3
"""Levels of a tile that is read: values at their coarsest; keys and values at their finest; originals."""


def signed_fields(packed: jax.Array, width: int) -> jax.Array:
    """Two's complement fields of bytes, lowest first: int8 [..., n] -> float32 [..., 8 n / width]."""
    bits = packed.astype(jnp.int32) & 255
    parts = [(bits >> low) & (2**width - 1) for low in range(0, 8, width)]
    codes = jnp.concatenate(parts, -1)
    return (codes - 2**width * (codes >= 2 ** (width - 1))).astype(jnp.float32)


def in_parts(x: jax.Array, splits: int) -> jax.Array:
    """Sums of tiles as programs that share them make them: `[H, NT, ...]` -> `[H, S, ...]`."""
    pad = -x.shape[1] % splits
    x = jnp.pad(x, ((0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2)))
    return x.reshape(x.shape[0], -1, splits, *x.shape[2:]).sum(1)


def attend_tiles(
    layer: jax.Array,  # [1] int32
    levels: jax.Array,  # [H, NT or more] int32
    weights: jax.Array,  # [H, NT, C, 128] bfloat16, of `scan_tiles`
    values: jax.Array,  # [L, H, NT, d, 64] int8
    *,
    splits: int = 1,
) -> jax.Array:
    """`sum w scale (4 high)` of tiles at level COARSE, with the scan's weights: [H, S, d, C], halves of the columns to
    be added up, in as many parts as there are `splits`, programs that share the tiles of a head. In units of the
    values' scale, and less an offset that is the caller's."""
    v = jnp.take(values, layer[0], 0)
    chosen = levels[:, : v.shape[1], None, None] == COARSE
    w = jnp.where(chosen, folded(weights.astype(jnp.float32).swapaxes(2, 3)), 0.0)  # [H, NT, 128, G]
    dot = functools.partial(jnp.einsum, "hjdt,hjtc->hjdc", precision="highest")
    return whole(in_parts(dot(4 * signed_fields(v, 4), w), splits))
