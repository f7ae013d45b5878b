"""Twin of `attend/mosaic.py`: chosen tiles with keys and values at their finest level."""

from __future__ import annotations

import jax
import jax.numpy as jnp

TILE = 128


def signed_fields(packed: jax.Array, width: int) -> jax.Array:
    """Two's complement fields of bytes, lowest first: int8 [..., n] -> float32 [..., 8 n / width]."""
    bits = packed.astype(jnp.int32) & 255
    parts = [(bits >> low) & (2**width - 1) for low in range(0, 8, width)]
    codes = jnp.concatenate(parts, -1)
    return (codes - 2**width * (codes >= 2 ** (width - 1))).astype(jnp.float32)


def attend_tiles(
    meta: jax.Array,  # [H, 4] int32
    chosen: jax.Array,  # [H, NT or more] int32, 1 where a tile is read
    q_high: jax.Array,  # [H, C, d] int8
    q_low: jax.Array,  # [H, C, d] int8
    q_halves: jax.Array,  # [H, 4, C, d/2] bfloat16
    coefficients: jax.Array,  # [H, 4, C] float32: unit, low unit, half, shift
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
    """`sum w y` over chosen tiles, `y = scale (4 high + low + 2.5)`, in as many parts as
    there are `splits`, programs that share the tiles of a head: [H, S, d, C]; and per chosen tile the sums of
    `scan_tiles` [H, NT, 3, C] (of other tiles: 0)."""
    layer, heads = meta[0, 0], keys.shape[1]
    k, k_low, ks, v, v_low, vs, share = (
        jnp.take(x, layer, 0) for x in (keys, keys_low, key_scale, values, values_low, value_scale, nu)
    )
    flags = chosen[:, : v.shape[1]]
    dot = jnp.einsum(
        "hnd,hcd->hnc", k.astype(jnp.int32), q_high.astype(jnp.int32) * 256 + q_low.astype(jnp.int32)
    ).astype(jnp.float32)
    halves = q_halves.astype(jnp.float32)
    q = jnp.concatenate([halves[:, 0] * 256 + halves[:, 2], halves[:, 1] * 256 + halves[:, 3]], -1)
    low = jnp.einsum("hnd,hcd->hnc", 16 * signed_fields(k_low, 4), q, precision="highest")
    unit, low_unit, half, shift = (coefficients[:, None, i] for i in range(4))
    w = jnp.exp2((dot * unit + low * low_unit + half) * ks.astype(jnp.float32)[..., None] + shift)
    w = jnp.where(jnp.repeat(flags, TILE, axis=1)[..., None] > 0, w, 0.0)  # [H, N, C]
    stats = jnp.stack([w, w * share.astype(jnp.float32)[..., None], w * w], 2)
    tiles = (heads, -1, TILE)
    weighted = (w * vs.astype(jnp.float32)[..., None]).reshape(*tiles, w.shape[-1])
    codes = 4 * signed_fields(v, 4) + signed_fields(v_low, 2) + 2.5  # [H, NT, d, TILE]
    acc = jnp.einsum("hjdt,hjtc->hjdc", codes, weighted, precision="highest")

    def split(x):  # [H, NT, ...] -> [H, S, ...]
        pad = -x.shape[1] % splits
        x = jnp.pad(x, ((0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2)))
        return x.reshape(heads, -1, splits, *x.shape[2:]).sum(1)

    return split(acc), stats.reshape(*tiles, 3, w.shape[-1]).sum(2)
