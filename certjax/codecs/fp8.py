"""`fp8_e4m3`: keys and values as 8-bit floats with one scale a tensor or a head, as serving engines store them.

The scale comes from the prompt, `peak / 448`; what later tokens have beyond the peak saturates, and is measured like
every other loss. Format: P. Micikevicius et al., *FP8 Formats for Deep Learning*, arXiv:2209.05433.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from certjax.codecs.base import Doubt, HeadStats, Level, Unturned
from certjax.errors import InvalidArgumentError
from pallas_kernels import numerics as num

TOP = 448.0
"""Largest finite E4M3 number."""


@flax.struct.dataclass
class Fp8Codes:
    """One block or many: every shape below may carry leading axes (batch, KV heads, blocks)."""

    k_codes: jax.Array  # [B, d] float8_e4m3fn
    k_scale: jax.Array  # [] float32, the same for all blocks: kept with each, so that a block decodes alone
    v_codes: jax.Array  # [B, d] float8_e4m3fn
    v_scale: jax.Array  # [] float32


@dataclasses.dataclass(frozen=True)
class Fp8(Unturned):
    """The codec. `fp8_scale`: one scale for the layer's tensor of a sequence ("tensor"), or one a KV head ("head").

    Raises
    ------
    InvalidArgumentError
        On another `fp8_scale`.
    """

    fp8_scale: Literal["tensor", "head"] = "tensor"
    name: str = dataclasses.field(default="fp8_e4m3", init=False)
    key_levels = 1
    value_levels = 1
    scaled = True

    def __post_init__(self):
        if self.fp8_scale not in ("tensor", "head"):
            raise InvalidArgumentError(f"fp8_scale must be 'tensor' or 'head', got {self.fp8_scale!r}.")

    def encode(self, keys: jax.Array, values: jax.Array, stats: HeadStats) -> Fp8Codes:
        k_codes, k_scale = self._encode(keys, stats.key_peak)
        v_codes, v_scale = self._encode(values, stats.value_peak)
        return Fp8Codes(k_codes=k_codes, k_scale=k_scale, v_codes=v_codes, v_scale=v_scale)

    def _encode(self, x: jax.Array, peak: jax.Array) -> tuple[jax.Array, jax.Array]:
        if self.fp8_scale == "tensor" and peak.ndim:
            peak = jnp.broadcast_to(peak.max(-1, keepdims=True), peak.shape)
        scale = num.normal_or_zero(peak / TOP)
        scale = jnp.where((scale > 0) & jnp.isfinite(scale), scale, 1.0)
        scale = jnp.broadcast_to(scale[..., None], x.shape[:-2])
        return _round_e4m3(x / scale[..., None, None]).astype(jnp.float8_e4m3fn), scale

    def keys(self, codes: Fp8Codes, level: Level) -> jax.Array:
        del level
        return codes.k_codes.astype(jnp.float32) * codes.k_scale[..., None, None]

    def values(self, codes: Fp8Codes, level: Level) -> jax.Array:
        del level
        return codes.v_codes.astype(jnp.float32) * codes.v_scale[..., None, None]

    def key_slack(self, codes: Fp8Codes, level: int, stats: HeadStats, doubt: Doubt) -> jax.Array:
        """`4 u ||k^||`: one product, rounded or contracted into what follows."""
        return 4 * num.U * num.norm_up(self.keys(codes, level))

    def value_slack(self, codes: Fp8Codes, level: int, stats: HeadStats, doubt: Doubt) -> jax.Array:
        """`4 u ||v^||`."""
        return 4 * num.U * num.norm_up(self.values(codes, level))

    def channel_bound(self, abs_q: jax.Array, codes: Fp8Codes) -> None:
        return None

    def paper_step_norm(self, codes: Fp8Codes) -> None:
        return None

    def key_bytes(self, size: int, d: int) -> tuple[int, ...]:
        return (size * d + 4,)

    def value_bytes(self, size: int, d: int) -> tuple[int, ...]:
        return (size * d + 4,)


def _round_e4m3(x: jax.Array) -> jax.Array:
    """`x` rounded to the nearest E4M3 number, in float32, so that the cast is exact whatever XLA makes of it."""
    x = jnp.clip(x, -TOP, TOP)
    normal = lax.reduce_precision(x, 8, 3)  # three bits of mantissa, float32's exponents
    return jnp.where(jnp.abs(x) < 2.0**-6, jnp.round(x * 2.0**9) * 2.0**-9, normal)
