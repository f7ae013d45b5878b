"""Twin of `scan/mosaic.py`: what a step learns of every tile from its keys at their coarsest level."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.levels import TILE
from pallas_kernels.originals.reference import attend_tile_of_originals
from pallas_kernels.query import HALF, SHIFT, UNIT, Operands, distinct, in_two_halves, together, twice, whole


def scan_tiles(
    layer: jax.Array,  # [1] int32
    meta: jax.Array,  # [H, 3] int32: first tile and end of those read from tier 1, length
    q: Operands,
    keys: jax.Array,  # [L, H, N, d] int8
    key_scale: jax.Array,  # [L, H, N] bfloat16
    value_scale: jax.Array,  # [L, H, N] bfloat16
    nu: jax.Array,  # [L, H, N] uint8, shares of the tile's peak
    live: jax.Array,  # [H, W] int32, tokens that each window tile holds, its first ones
    windows: tuple[jax.Array, ...],  # keys, values, keys, values ...: [L, H, n 128, d] bfloat16, W tiles in all
    *,
    splits: int = 1,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
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
    acc, sums : [H, W, d, C], [H, W, 4, C]
        Of every window tile what `attend_originals` returns.

    `splits` is the kernel's: how many programs share the keys of a head.
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
    found = []
    for keys, values in zip(windows[::2], windows[1::2], strict=True):
        for tile in range(keys.shape[2] // TILE):
            cut = slice(tile * TILE, tile * TILE + TILE)
            k, v = (jnp.take(x, layer[0], 0)[:, cut] for x in (keys, values))
            found.append(attend_tile_of_originals(k, v, live[:, len(found)], q))
    acc, sums = (jnp.stack(x, 1) for x in zip(*found, strict=True))
    return stats, weights, whole(acc), twice(sums)


def tile_statistics(w: jax.Array, weighted: jax.Array, share: jax.Array, key_scale: jax.Array) -> jax.Array:
    """Sums over tiles `[H, NT, 4, C]`. `w`, `weighted`: [H, N, G] weights, and times their values' scale; `share`,
    `key_scale`: [H, N].

    The halves of the first two rows are `sum w`, `sum w share`, and the same times the key's scale; the other two
    repeat `sum w^2` and `sum weighted`.
    """
    share, key_scale = (x.astype(jnp.float32)[..., None] for x in (share, key_scale))
    keyed = w * key_scale
    first = jnp.concatenate([jnp.stack([w, w * share], 2), jnp.stack([keyed, keyed * share], 2)], -1)
    rows = jnp.concatenate([first, twice(jnp.stack([w * w, weighted], 2))], 2)  # [H, N, 4, C]
    return rows.reshape(w.shape[0], -1, TILE, *rows.shape[2:]).sum(2)
