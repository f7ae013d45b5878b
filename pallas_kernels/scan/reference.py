"""Twin of `scan/mosaic.py`: what a step learns of every tile from its keys at their coarsest level."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.originals.reference import attend_tile_of_originals


def scan_tiles(
    meta: jax.Array,  # [H, 4] int32: layer, first tile and end of those read from tier 1, length
    q_high: jax.Array,  # [H, C, d] int8
    q_low: jax.Array,  # [H, C, d] int8
    coefficients: jax.Array,  # [H, 3, C] float32: unit, half, shift
    keys: jax.Array,  # [L, H, N, d] int8
    scale: jax.Array,  # [L, H, N] bfloat16
    nu: jax.Array,  # [L, H, N] uint8, shares of the tile's peak
    live: jax.Array,  # [H, W] int32, tokens that each window tile holds, its first ones
    q_pair: jax.Array,  # [H, 2, C, d] bfloat16
    window_coefficients: jax.Array,  # [H, 2, C] float32: unit, shift
    windows: tuple[jax.Array, ...],  # keys, values, keys, values ...: [L, H, n 128, d] bfloat16, W tiles in all
    *,
    splits: int = 1,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Per tile `sum w`, `sum w share`, `sum w^2` with `w = 2^(scale (unit q.k + half) + shift)`: [H, NT, 3, C].

    Tiles that are not read are 0 (in the kernel: anything). Of every window tile what `attend_originals` returns:
    [H, W, d, C] and [H, W, 4, C].

    `splits` is the kernel's: how many programs share the keys of a head.
    """
    layer, first, end = meta[0, 0], meta[:, 1], meta[:, 2]
    k, s, share = (jnp.take(x, layer, 0) for x in (keys, scale, nu))
    q = q_high.astype(jnp.int32) * 256 + q_low.astype(jnp.int32)
    dot = jnp.einsum("hnd,hcd->hnc", k.astype(jnp.int32), q).astype(jnp.float32)
    unit, half, shift = (coefficients[:, None, i] for i in range(3))  # [H, 1, C]
    w = jnp.exp2((dot * unit + half) * s.astype(jnp.float32)[..., None] + shift)
    stats = jnp.stack([w, w * share.astype(jnp.float32)[..., None], w * w], 2)  # [H, N, 3, C]
    heads, n, _, columns = stats.shape
    stats = stats.reshape(heads, n // 128, 128, 3, columns).sum(2)
    tile = jnp.arange(n // 128)
    read = (tile >= first[:, None]) & (tile < end[:, None])
    stats = jnp.where(read[..., None, None], stats, 0.0)
    parts = []
    for keys, values in zip(windows[::2], windows[1::2], strict=True):
        for tile in range(keys.shape[2] // 128):
            cut = slice(tile * 128, tile * 128 + 128)
            k, v = (jnp.take(x, layer, 0)[:, cut] for x in (keys, values))
            parts.append(attend_tile_of_originals(k, v, live[:, len(parts)], q_pair, window_coefficients))
    acc, sums = (jnp.stack(x, 1) for x in zip(*parts, strict=True))
    return stats, acc, sums
