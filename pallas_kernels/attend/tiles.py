"""Twin of `attend/mosaic.py`: chosen tiles, each at one of two levels."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.query import HALF_FINE, LOW_UNIT, SHIFT, UNIT, Operands, distinct, folded, together

TILE = 128
FINEST = 2
"""Level of a tile that is read with keys and values at their finest."""


def signed_fields(packed: jax.Array, width: int) -> jax.Array:
    """Two's complement fields of bytes, lowest first: int8 [..., n] -> float32 [..., 8 n / width]."""
    bits = packed.astype(jnp.int32) & 255
    parts = [(bits >> low) & (2**width - 1) for low in range(0, 8, width)]
    codes = jnp.concatenate(parts, -1)
    return (codes - 2**width * (codes >= 2 ** (width - 1))).astype(jnp.float32)


def attend_tiles(
    layer: jax.Array,  # [1] int32
    levels: jax.Array,  # [H, NT] int32: 1 for values at their coarsest, FINEST for keys and values at their finest
    weights: jax.Array,  # [H, NT, C, 128] bfloat16, of `scan_tiles`
    q: Operands,
    keys: jax.Array,  # [L, H, N, d] int8
    keys_low: jax.Array,  # [L, H, N, d/2] int8
    key_scale: jax.Array,  # [L, H, N] bfloat16
    values: jax.Array,  # [L, H, NT, d, 64] int8
    values_low: jax.Array,  # [L, H, NT, d, 32] int8
    value_scale: jax.Array,  # [L, H, N] bfloat16
    nu: jax.Array,  # [L, H, N] uint8
    *,
    splits: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Values of chosen tiles, weighted, in units of their scale, and less an offset that is the caller's.

    Of a tile at level 1 `sum w scale (4 high)` with the scan's weights, of one at level `FINEST` with weights of its
    own `sum w scale (4 high + low)`: [H, S, d, G] in as many parts as there are `splits`, programs that share the tiles
    of a head. And per tile at level `FINEST` the sums of `scan_tiles`: [H, NT, 4, G] (of other tiles: 0; in the kernel:
    anything).
    """
    heads = keys.shape[1]
    k, k_low, ks, v, v_low, vs, share = (
        jnp.take(x, layer[0], 0) for x in (keys, keys_low, key_scale, values, values_low, value_scale, nu)
    )
    parts = distinct(q.parts, 2)
    dot = together(jnp.einsum("hnd,hpcd->phnc", k.astype(jnp.int32), parts.astype(jnp.int32)))
    product = functools.partial(jnp.einsum, "hnd,hpcd->phnc", precision="highest")
    low = together(product(16 * signed_fields(k_low, 4), parts.astype(jnp.float32)))
    x = dot * q.row(UNIT) + low * q.row(LOW_UNIT) + q.row(HALF_FINE)
    # A barrier: all sums are of one evaluation, as in the kernel.
    w = jax.lax.optimization_barrier(jnp.exp2(x * ks.astype(jnp.float32)[..., None] + q.row(SHIFT)))  # [H, N, G]
    w = jnp.where(jnp.repeat(levels, TILE, axis=1)[..., None] == FINEST, w, 0.0)
    fine = w * vs.astype(jnp.float32)[..., None]
    stats = jnp.stack([w, w * share.astype(jnp.float32)[..., None], w * w, fine], 2)
    coarse = jnp.where(levels[..., None, None] == 1, folded(weights.astype(jnp.float32).swapaxes(2, 3)), 0.0)
    tiles = (heads, -1, TILE)
    fine = fine.reshape(*tiles, w.shape[-1])
    dot = functools.partial(jnp.einsum, "hjdt,hjtc->hjdc", precision="highest")
    acc = dot(4 * signed_fields(v, 4), coarse + fine) + dot(signed_fields(v_low, 2), fine)

    def split(x):  # [H, NT, ...] -> [H, S, ...]
        pad = -x.shape[1] % splits
        x = jnp.pad(x, ((0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2)))
        return x.reshape(heads, -1, splits, *x.shape[2:]).sum(1)

    return split(acc), stats.reshape(*tiles, 4, w.shape[-1]).sum(2)
