"""Twin of `refine/mosaic.py`: tiles at the finest level, and promoted ones."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.attend.tiles import FINEST, PROMOTED, TILE, in_parts, signed_fields
from pallas_kernels.originals.reference import attend_originals
from pallas_kernels.query import HALF_FINE, LOW_UNIT, SHIFT, UNIT, Operands, distinct, together, twice, whole


def refine_tiles(
    layer: jax.Array,  # [1] int32
    meta: jax.Array,  # [H, 3] int32
    levels: jax.Array,  # [H, NT or more] int32
    counts: jax.Array,  # [H, 5] int32, in columns 2 and 3 how many tiles are at level FINEST and PROMOTED
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
    """Of heads that have none of a kind nothing is found (in the kernel: anything).

    Of tiles at level FINEST `sum w scale (4 high + low)`, as `attend_tiles` has its sums, with weights of their own,
    and per tile the sums of `scan_tiles`, [H, NT, 4, C] (of other tiles: 0; in the kernel: anything). Of promoted tiles
    what `attend_originals` finds, in some number of parts.
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
    stats = jnp.stack([w, w * share.astype(jnp.float32)[..., None], w * w, weighted], 2)
    tiles = (heads, -1, TILE)
    weighted = weighted.reshape(*tiles, w.shape[-1])
    dot = functools.partial(jnp.einsum, "hjdt,hjtc->hjdc", precision="highest")
    acc = dot(4 * signed_fields(v, 4), weighted) + dot(signed_fields(v_low, 2), weighted)
    found = whole(in_parts(acc, splits)), twice(stats.reshape(*tiles, 4, w.shape[-1]).sum(2))
    if host_keys is None:
        return found
    promoted = (levels == PROMOTED).astype(jnp.int32)
    return *found, *attend_originals(layer, meta, promoted, counts[:, 3], q, host_keys, host_values, splits=splits)
