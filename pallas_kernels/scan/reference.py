"""Twin of `scan/mosaic.py` and `scan/triton.py`: what a step learns of every tile from its keys at their coarsest
level, and of the values that a plan asks for at theirs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.coarse.reference import attend_coarse
from pallas_kernels.levels import SKIP, TILE
from pallas_kernels.originals.reference import attend_tile_of_originals
from pallas_kernels.query import HALF, SHIFT, UNIT, Operands, distinct, in_two_halves, together, twice, whole
from pallas_kernels.twins import tile_statistics


def scan_tiles(
    layer: jax.Array,  # [1] int32
    meta: jax.Array,  # [H, 3] int32: first tile and end of those read from tier 1, length
    words: jax.Array,  # [H, NT or more] int32, `pallas_kernels.levels`
    q: Operands,
    keys: jax.Array,  # [L, H, N, d] int8
    key_scale: jax.Array,  # [L, H, N] bfloat16
    values: jax.Array,  # [L, H, NT, d, 64] int8
    values_low: jax.Array,  # [L, H, NT, d, 32] int8
    value_scale: jax.Array,  # [L, H, N] bfloat16
    nu: jax.Array,  # [L, H, N] uint8, shares of the tile's peak
    live: jax.Array,  # [H, W] int32, tokens that each window tile holds, its first ones
    windows: tuple[jax.Array, ...],  # keys, values, keys, values ...: [L, H, n 128, d] bfloat16, W tiles in all
    *,
    splits: int = 1,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Weights `w = 2^x` of every token, `x` its score, summed over tiles.

    Queries come with C = 2 G columns, the second half repeating the first. As in all kernels here, sums repeat, too; of
    `acc` the halves are to be added up.

    Returns
    -------
    stats : [H, NT, 4, C]
        Per tile `sum w`, `sum w share`, `sum w^2`, `sum w value_scale`, the first two again times the key's scale in
        their second halves (`tile_statistics`). Of tiles that are not read: 0 (in the kernel: anything).
    weights : [H, NT, C, 128] bfloat16
        `w value_scale` for the second pass, see `in_two_halves`. Of tiles that are not read: anything.
    coarse : [H, S, d, C]
        Of tiles at levels COARSE and VALUES what `attend_coarse` returns.
    acc, sums : [H, W, d, C], [H, W, 4, C]
        Of every window tile what `attend_originals` returns.

    `splits`: how many programs share the tiles of a head.
    """
    first, end = meta[:, 0], meta[:, 1]
    k, ks, vs, share = (jnp.take(x, layer[0], 0) for x in (keys, key_scale, value_scale, nu))
    parts = distinct(q.parts, 2).astype(jnp.int32)
    dot = together(jnp.einsum("hnd,hpcd->phnc", k.astype(jnp.int32), parts))
    x = (dot * q.row(UNIT) + q.row(HALF)) * ks.astype(jnp.float32)[..., None] + q.row(SHIFT)
    w = jax.lax.optimization_barrier(jnp.exp2(x))  # [H, N, G]; all sums are of one evaluation, as in the kernel
    weighted = w * vs.astype(jnp.float32)[..., None]
    heads, n, columns = w.shape
    stats = tile_statistics(w, weighted, share, ks)
    tile = jnp.arange(n // TILE)
    read = (tile >= first[:, None]) & (tile < end[:, None])
    stats = jnp.where(read[..., None, None], stats, 0.0)
    weights = in_two_halves(weighted).reshape(heads, n // TILE, TILE, 2 * columns).swapaxes(2, 3)
    words = jnp.where(read, words[:, : n // TILE], SKIP)
    coarse = attend_coarse(layer, words, None, weights, values, values_low, splits=splits)
    found = []
    for kept in zip(windows[::2], windows[1::2], strict=True):
        for tile in range(kept[0].shape[2] // TILE):
            cut = slice(tile * TILE, tile * TILE + TILE)
            k, v = (jnp.take(x, layer[0], 0)[:, cut] for x in kept)
            found.append(attend_tile_of_originals(k, v, live[:, len(found)], q))
    acc, sums = (jnp.stack(x, 1) for x in zip(*found, strict=True))
    return stats, weights, coarse, whole(acc), twice(sums)
