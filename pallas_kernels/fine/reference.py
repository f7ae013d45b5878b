"""Twin of `fine/mosaic.py` and `fine/triton.py`: chosen tiles with both planes of keys and values, and pieces of
originals."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.levels import FINEST, TILE, level_of, promoted_pieces, tokens_of_a_piece
from pallas_kernels.originals.reference import attend_pieces
from pallas_kernels.query import HALF_FINE, LOW_UNIT, SHIFT, UNIT, Operands, distinct, together, whole
from pallas_kernels.twins import in_first, signed_fields, tile_statistics


def attend_fine(
    layer: jax.Array,  # [1] int32
    words: jax.Array,  # [H, NT or more] int32, `pallas_kernels.levels`
    counts: jax.Array,  # [H, COUNTS] int32
    summary: jax.Array,  # [H, .] int32: by this and `counts` the kernel finds its work
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
    """Of tiles at levels FINEST and PROMOTED, less the pieces that are promoted, `sum w scale (4 high + low)` with
    weights of their own: [H, S, d, C] as `attend_coarse` returns it; and per tile the sums of `scan_tiles`,
    [H, NT, 4, C] (of other tiles: 0; in the kernel: anything). And of promoted pieces what `attend_originals` finds, in
    some number of parts, of which those that read nothing say so by a total of 0 (the rest of what they return: in the
    kernel anything). Of programs that are not at work (`levels.at_work`): 0 (in the kernel: anything).
    """
    heads = keys.shape[1]
    k, k_low, ks, v, v_low, vs, share = (
        jnp.take(x, layer[0], 0) for x in (keys, keys_low, key_scale, values, values_low, value_scale, nu)
    )
    words, parts = words[:, : v.shape[1]], distinct(q.parts, 2)
    dot = together(jnp.einsum("hnd,hpcd->phnc", k.astype(jnp.int32), parts.astype(jnp.int32)))
    product = functools.partial(jnp.einsum, "hnd,hpcd->phnc", precision="highest")
    low = together(product(16 * signed_fields(k_low, 4), parts.astype(jnp.float32)))
    x = dot * q.row(UNIT) + low * q.row(LOW_UNIT) + q.row(HALF_FINE)
    # A barrier: all sums are of one evaluation, as in the kernel.
    w = jax.lax.optimization_barrier(jnp.exp2(x * ks.astype(jnp.float32)[..., None] + q.row(SHIFT)))  # [H, N, G]
    d = keys.shape[3]
    seen = (level_of(words) >= FINEST)[..., None] & ~promoted_pieces(words, d)
    seen = jnp.repeat(seen, tokens_of_a_piece(d), axis=2)
    w = jnp.where(seen.reshape(heads, -1, 1), w, 0.0)
    weighted = w * vs.astype(jnp.float32)[..., None]
    stats = tile_statistics(w, weighted, share, ks)
    weighted = weighted.reshape(heads, -1, TILE, w.shape[-1])
    dot = functools.partial(jnp.einsum, "hjdt,hjtc->hjdc", precision="highest")
    acc = dot(4 * signed_fields(v, 4) + signed_fields(v_low, 2), weighted)
    found = whole(in_first(acc.sum(1), splits)), stats
    if host_keys is None:
        return found
    return *found, *attend_pieces(layer, words, q, host_keys, host_values, splits=splits)
