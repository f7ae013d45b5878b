"""INT8 keys as `int8_int4` has them, values in float16: what compressing values costs, seen by leaving it out."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from certjax.codecs.affine import Affine, AffineCodes, saturate
from certjax.codecs.base import Doubt, HeadStats, Level


@dataclasses.dataclass(frozen=True)
class KeysOnly(Affine):
    """The codec. Values that float16 holds are exact; others are rounded, or saturate. `v_codes` is `[B, d]` float16,
    scales and offsets of values are empty. `group_size` has no effect."""

    name: str = "int8_fp16"
    value_bits: int = dataclasses.field(default=8, init=False)
    group_size: int = dataclasses.field(default=1, init=False)

    def _encode_values(self, values: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        nothing = jnp.zeros((*values.shape[:-1], 0), jnp.float16)
        return saturate(values, jnp.float16), nothing, nothing

    def values(self, codes: AffineCodes, level: Level) -> jax.Array:
        del level
        return codes.v_codes.astype(jnp.float32)

    def value_slack(self, codes: AffineCodes, level: int, stats: HeadStats, doubt: Doubt) -> jax.Array:
        """0: decoding does no arithmetic."""
        del level, stats, doubt
        return jnp.zeros(codes.v_codes.shape[:-1])

    def value_bytes(self, size: int, d: int) -> tuple[int, ...]:
        return (size * d * 2,)
