"""Twin of `coarse/mosaic.py`: values of chosen tiles at their coarsest, with the weights that the scan left."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.levels import COARSE, level_of
from pallas_kernels.query import folded, whole


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


def attend_coarse(
    layer: jax.Array,  # [1] int32
    words: jax.Array,  # [H, NT or more] int32, `pallas_kernels.levels`
    weights: jax.Array,  # [H, NT, C, 128] bfloat16, of `scan_tiles`
    values: jax.Array,  # [L, H, NT, d, 64] int8
    *,
    splits: int = 1,
) -> jax.Array:
    """Of tiles at level COARSE `sum w scale (4 high)`: [H, S, d, C], halves of the columns to be added up, in as many
    parts as there are `splits`, programs that share the tiles of a head; in units of the values' scale, and less an
    offset that is the caller's."""
    v = jnp.take(values, layer[0], 0)
    chosen = (level_of(words[:, : v.shape[1]]) == COARSE)[..., None, None]
    w = jnp.where(chosen, folded(weights.astype(jnp.float32).swapaxes(2, 3)), 0.0)  # [H, NT, 128, G]
    acc = jnp.einsum("hjdt,hjtc->hjdc", 4 * signed_fields(v, 4), w, precision="highest")
    return whole(in_parts(acc, splits))
