"""What the kernels' twins share."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.levels import TILE
from pallas_kernels.query import twice


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


def in_first(x: jax.Array, parts: int) -> jax.Array:
    """All in the first of so many parts, of which the others may not be at work: `[H, ...]` -> `[H, parts, ...]`."""
    return jnp.zeros((x.shape[0], parts, *x.shape[1:]), x.dtype).at[:, 0].set(x)


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
