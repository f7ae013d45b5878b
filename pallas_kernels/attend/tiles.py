"""Twin of `attend/mosaic.py`: chosen tiles, each at one of three levels."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.originals.reference import attend_originals
from pallas_kernels.query import HALF_FINE, LOW_UNIT, SHIFT, UNIT, Operands, distinct, folded, together, whole
from pallas_kernels.scan.reference import tile_statistics

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
    meta: jax.Array,  # [H, 3] int32
    levels: jax.Array,  # [H, NT or more] int32
    counts: jax.Array,  # [H, 5] int32, in columns 2 and 3 how many tiles are at level FINEST and PROMOTED
    weights: jax.Array,  # [H, NT, C, 128] bfloat16, of `scan_tiles`
    q: Operands,
    keys: jax.Array,  # [L, H, N, d] int8
    keys_low: jax.Array,  # [L, H, N, d/2] int8
    key_scale: jax.Array,  # [L, H, N] bfloat16
    values: jax.Array,  # [L, H, NT, d, 64] int8
    values_low: jax.Array,  # [L, H, NT, d, 32] int8
    value_scale: jax.Array,  # [L, H, N] bfloat16
    nu: jax.Array,  # [L, H, N] uint8
    host_keys: jax.Array | None,  # [L, H, N, d] bfloat16; without, none are read
    host_values: jax.Array | None,
    *,
    splits: int = 1,
) -> tuple[jax.Array, ...]:
    """Of tiles at level COARSE `sum w scale (4 high)` with the scan's weights, of those at level FINEST
    `sum w scale (4 high + low)` with weights of their own: [H, S, d, C], halves of the columns to be added up, in as
    many parts as there are `splits`, programs that share the tiles of a head; in units of the values' scale, and less
    an offset that is the caller's. And per tile at level FINEST the sums of `scan_tiles`, [H, NT, 4, C] (of other
    tiles: 0; in the kernel: anything). And of promoted tiles what `attend_originals` finds, in some number of parts; of
    heads that have none: nothing (in the kernel: anything).
    """
    heads = keys.shape[1]
    k, k_low, ks, v, v_low, vs, share = (
        jnp.take(x, layer[0], 0) for x in (keys, keys_low, key_scale, values, values_low, value_scale, nu)
    )
    levels, parts = levels[:, : v.shape[1]], distinct(q.parts, 2)
    dot = together(jnp.einsum("hnd,hpcd->phnc", k.astype(jnp.int32), parts.astype(jnp.int32)))
    product = functools.partial(jnp.einsum, "hnd,hpcd->phnc", precision="highest")
    low = together(product(16 * signed_fields(k_low, 4), parts.astype(jnp.float32)))
    x = dot * q.row(UNIT) + low * q.row(LOW_UNIT) + q.row(HALF_FINE)
    # A barrier: all sums are of one evaluation, as in the kernel.
    w = jax.lax.optimization_barrier(jnp.exp2(x * ks.astype(jnp.float32)[..., None] + q.row(SHIFT)))  # [H, N, G]
    w = jnp.where(jnp.repeat(levels, TILE, axis=1)[..., None] == FINEST, w, 0.0)
    weighted = w * vs.astype(jnp.float32)[..., None]
    stats = tile_statistics(w, weighted, share, ks)
    tiles = (heads, -1, TILE)
    weighted = weighted.reshape(*tiles, w.shape[-1])
    coarse = jnp.where(levels[..., None, None] == COARSE, folded(weights.astype(jnp.float32).swapaxes(2, 3)), 0.0)
    dot = functools.partial(jnp.einsum, "hjdt,hjtc->hjdc", precision="highest")
    acc = dot(4 * signed_fields(v, 4), coarse + weighted) + dot(signed_fields(v_low, 2), weighted)
    found = whole(in_parts(acc, splits)), stats
    if host_keys is None:
        return found
    promoted = (levels == PROMOTED).astype(jnp.int32)
    return *found, *attend_originals(layer, meta, promoted, counts[:, 3], q, host_keys, host_values, splits=splits)
