"""Twin of `coarse/triton.py`: values of chosen tiles, with the weights that the scan left."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.levels import VALUES, by_scan, level_of
from pallas_kernels.query import folded, whole
from pallas_kernels.twins import in_parts, signed_fields


def attend_coarse(
    layer: jax.Array,  # [1] int32
    words: jax.Array,  # [H, NT or more] int32, `pallas_kernels.levels`
    counts: jax.Array,  # [H, COUNTS] int32: where these have no such tile, the kernel does nothing
    weights: jax.Array,  # [H, NT, C, 128] bfloat16, of `scan_tiles`
    values: jax.Array,  # [L, H, NT, d, 64] int8
    values_low: jax.Array,  # [L, H, NT, d, 32] int8
    *,
    splits: int = 1,
) -> jax.Array:
    """Of tiles at level COARSE `sum w scale (4 high)`, of those at VALUES `sum w scale (4 high + low)`: [H, S, d, C],
    halves of the columns to be added up, in as many parts as there are `splits`, programs that share the tiles of a
    head; in units of the values' scale, and less an offset that is the caller's."""
    v, v_low = (jnp.take(x, layer[0], 0) for x in (values, values_low))
    level = level_of(words[:, : v.shape[1]])[..., None, None]
    w = jnp.where(by_scan(level), folded(weights.astype(jnp.float32).swapaxes(2, 3)), 0.0)  # [H, NT, 128, G]
    codes = 4 * signed_fields(v, 4) + jnp.where(level == VALUES, signed_fields(v_low, 2), 0.0)
    acc = jnp.einsum("hjdt,hjtc->hjdc", codes, w, precision="highest")
    return whole(in_parts(acc, splits))
