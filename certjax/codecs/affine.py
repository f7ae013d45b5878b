"""Affine integer codes: keys per channel and block, values per token and group of channels.

The paper's tier 1 (`int8_int4`: INT8 keys, INT4 values; arXiv:2605.20868, section 3) and its relatives: INT8 values,
and the 4- and 2-bit caches in the manner of KIVI (Liu et al., arXiv:2402.02750). With b bits, one scale and offset per
channel of a block of keys, `sigma = (max - min)/(2^b - 1)`, `z = min + 2^(b-1) sigma`,
`code = clip(round((k - z)/sigma), -2^(b-1), 2^(b-1) - 1)`; one float16 scale and offset per group of `g` channels of
a token's value, whose codes count from 0.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from certjax.codecs import packing
from certjax.codecs.base import Doubt, HeadStats, Level, Unturned
from certjax.errors import InvalidArgumentError
from pallas_kernels import numerics as num


@flax.struct.dataclass
class AffineCodes:
    """One block or many: every shape below may carry leading axes (batch, KV heads, blocks)."""

    k_codes: jax.Array  # [B, d] int8, or [B, d b/8] uint8 packed and counted from 0
    k_scale: jax.Array  # [d] float32 or float16, sigma
    k_zero: jax.Array  # [d] float32 or float16, z
    k_reach: jax.Array  # [] bfloat16, largest |k - k^| in units of sigma/2, rounded up
    v_codes: jax.Array  # [B, d b/8] uint8
    v_scale: jax.Array  # [B, d/g] float16
    v_zero: jax.Array  # [B, d/g] float16, value of code 0


@dataclasses.dataclass(frozen=True)
class Affine(Unturned):
    """The codec. `group_size` is `g`; `key_metadata` is the dtype of sigma and z.

    Raises
    ------
    InvalidArgumentError
        On a metadata dtype other than float32 or float16, a group size below 1, or bits other than 2, 4, 8.
    """

    name: str = "int8_int4"
    key_bits: int = 8
    value_bits: int = 4
    group_size: int = 16
    key_metadata: str = "float32"
    key_levels = 1
    value_levels = 1
    scaled = False

    def __post_init__(self):
        if self.key_metadata not in ("float32", "float16"):
            raise InvalidArgumentError(
                f"key_metadata must be 'float32' or 'float16', got {self.key_metadata!r}."
            )
        if self.group_size < 1:
            raise InvalidArgumentError(f"group_size must be at least 1, got {self.group_size}.")
        for name in ("key_bits", "value_bits"):
            if getattr(self, name) not in (2, 4, 8):
                raise InvalidArgumentError(f"{name} must be 2, 4 or 8, got {getattr(self, name)}.")

    def encode(self, keys: jax.Array, values: jax.Array, stats: HeadStats) -> AffineCodes:
        del stats  # the format has offsets of its own
        d = keys.shape[-1]
        if d % 2 or d % self.group_size or d * self.key_bits % 8:
            raise InvalidArgumentError(
                f"head dim {d} must be even and a multiple of group_size={self.group_size}; "
                "choose a group_size that divides it."
            )
        meta, half = jnp.dtype(self.key_metadata), 2 ** (self.key_bits - 1)
        low, high = keys.min(-2), keys.max(-2)  # [..., d]
        # Halves first: max - min of bfloat16 originals may exceed float32. Halving is exact, so that no contraction of
        # operations can make two evaluations of sigma (stored, fingerprinted) differ.
        sigma = num.normal_or_zero(saturate((0.5 * high - 0.5 * low) / (half - 0.5), meta))
        # A constant channel has sigma = 0 and is carried by z alone, which must then be exact.
        zero = saturate(jnp.where(sigma == 0, low, low + half * sigma.astype(jnp.float32)), meta)
        step, offset = sigma.astype(jnp.float32)[..., None, :], zero.astype(jnp.float32)[..., None, :]
        ratio = (keys - offset) / jnp.where(step == 0, 1.0, step)
        codes = jnp.clip(jnp.round(ratio), -half, half - 1)
        residual = jnp.abs(keys - _affine(codes, step, offset))
        reach = jnp.where(residual == 0, 0.0, residual / (0.5 * step))
        v_codes, v_scale, v_zero = self._encode_values(values)
        return AffineCodes(
            k_codes=self._store_keys(codes),
            k_scale=sigma,
            k_zero=zero,
            # Two float32 decodes may differ by an ulp of the offset: in units of sigma/2.
            k_reach=num.round_up_bf16(
                jnp.where(step == 0, reach, reach + 8 * num.U * (jnp.abs(offset) + half * step) / step).max((-2, -1))
                * num.NORM_SLACK
            ),
            v_codes=v_codes,
            v_scale=v_scale,
            v_zero=v_zero,
        )

    def _store_keys(self, codes: jax.Array) -> jax.Array:
        if self.key_bits == 8:
            return codes.astype(jnp.int8)
        return packing.pack((codes + 2 ** (self.key_bits - 1)).astype(jnp.int32), self.key_bits)

    def _encode_values(self, values: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        *lead, d = values.shape
        top = 2**self.value_bits - 1
        grouped = values.reshape(*lead, d // self.group_size, self.group_size)
        low, high = grouped.min(-1), grouped.max(-1)
        scale = num.normal_or_zero(saturate((0.5 * high - 0.5 * low) / (top / 2), jnp.float16))
        zero = saturate(low, jnp.float16)
        step, offset = scale.astype(jnp.float32)[..., None], zero.astype(jnp.float32)[..., None]
        ratio = (grouped - offset) / jnp.where(step == 0, 1.0, step)
        codes = jnp.clip(jnp.round(ratio), 0, top).astype(jnp.int32).reshape(*lead, d)
        return packing.pack(codes, self.value_bits), scale, zero

    def keys(self, codes: AffineCodes, level: Level) -> jax.Array:
        del level
        step, stored = codes.k_scale.astype(jnp.float32)[..., None, :], codes.k_codes
        if self.key_bits < 8:
            stored = packing.unpack(stored, self.key_bits) - 2 ** (self.key_bits - 1)
        return _affine(stored, step, codes.k_zero.astype(jnp.float32)[..., None, :])

    def values(self, codes: AffineCodes, level: Level) -> jax.Array:
        del level
        both = packing.unpack(codes.v_codes, self.value_bits)
        grouped = both.reshape(*both.shape[:-1], -1, self.group_size)
        step = codes.v_scale.astype(jnp.float32)[..., None]
        offset = codes.v_zero.astype(jnp.float32)[..., None]
        return _affine(grouped, step, offset).reshape(both.shape)

    def key_slack(self, codes: AffineCodes, level: int, stats: HeadStats, doubt: Doubt) -> jax.Array:
        """`4 u` times the norm of `|z| + 2^(b-1) sigma`."""
        del level, stats, doubt
        half = 2 ** (self.key_bits - 1)
        k = jnp.abs(codes.k_zero.astype(jnp.float32)) + half * codes.k_scale.astype(jnp.float32)
        return 4 * num.U * jnp.broadcast_to(num.norm_up(k)[..., None], codes.k_codes.shape[:-1])

    def value_slack(self, codes: AffineCodes, level: int, stats: HeadStats, doubt: Doubt) -> jax.Array:
        """`4 u` times the norm of `|zero| + (2^b - 1) scale`."""
        del level, stats, doubt
        v = jnp.abs(codes.v_zero.astype(jnp.float32)) + (2**self.value_bits - 1) * codes.v_scale.astype(jnp.float32)
        v_slack = num.norm_up(v) * self.group_size**0.5
        return 4 * num.U * v_slack * num.NORM_SLACK

    def channel_bound(self, abs_q: jax.Array, codes: AffineCodes) -> jax.Array:
        """`0.5 sum_c |q_c| sigma_c` times the measured reach (1 when no code saturated or rounded badly)."""
        half = 0.5 * codes.k_scale.astype(jnp.float32)  # [..., NB, d]
        bound = jnp.einsum("...gd,...nd->...gn", abs_q, half, precision=lax.Precision.HIGHEST)
        # 0 * inf: a channel that is not constant but has sigma = 0 makes the reach infinite.
        reach = codes.k_reach.astype(jnp.float32)[..., None, :]
        return jnp.where(jnp.isfinite(reach), bound * reach * (1 + 2.0**-10), jnp.inf)

    def paper_step_norm(self, codes: AffineCodes) -> jax.Array:
        return 0.5 * num.norm_up(codes.k_scale.astype(jnp.float32))

    def key_bytes(self, size: int, d: int) -> tuple[int, ...]:
        return (size * d * self.key_bits // 8 + 2 * d * jnp.dtype(self.key_metadata).itemsize + 2,)

    def value_bytes(self, size: int, d: int) -> tuple[int, ...]:
        return (size * (d * self.value_bits // 8 + 4 * d // self.group_size),)


def _affine(codes: jax.Array, step: jax.Array, offset: jax.Array) -> jax.Array:
    return codes.astype(jnp.float32) * step + offset


def saturate(x: jax.Array, dtype) -> jax.Array:
    """Cast to `dtype`, to its largest number where x is beyond it: a code that is far off has a large but
    finite measured error, an infinite one would take the layer down."""
    top = float(jnp.finfo(dtype).max)
    return num.cast(jnp.clip(x, -top, top), dtype)
