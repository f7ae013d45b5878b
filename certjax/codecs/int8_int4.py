"""`int8_int4`, the paper's tier 1: INT8 keys per channel and block, INT4 values per group of channels.

Keys: one affine scale and offset per channel per block of B tokens, `sigma = (max - min)/255`,
`z = min + 128 sigma`, `code = clip(round((k - z)/sigma), -128, 127)`. Values: two codes a byte, one float16
scale and offset per group of `g` channels per token. Source: arXiv:2605.20868, section 3.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from certjax.codecs.base import Centres
from certjax.errors import InvalidArgumentError
from pallas_kernels import numerics as num


@flax.struct.dataclass
class Int8Int4Codes:
    """One block or many: every shape below may carry leading axes (batch, KV heads, blocks)."""

    k_codes: jax.Array  # [B, d] int8
    k_scale: jax.Array  # [d] float32 or float16, sigma
    k_zero: jax.Array  # [d] float32 or float16, z
    k_reach: jax.Array  # [] bfloat16, largest |k - k^| in units of sigma/2, rounded up
    v_codes: jax.Array  # [B, d/2] uint8, channel c in the low half, c + d/2 in the high half
    v_scale: jax.Array  # [B, d/g] float16
    v_zero: jax.Array  # [B, d/g] float16, value of code 0


@dataclasses.dataclass(frozen=True)
class Int8Int4:
    """The codec. `group_size` is `g`; `key_metadata` is the dtype of sigma and z.

    Raises
    ------
    InvalidArgumentError
        On a metadata dtype other than float32 or float16, or a group size below 1.
    """

    group_size: int = 16
    key_metadata: str = "float32"
    name: str = dataclasses.field(default="int8_int4", init=False)

    def __post_init__(self):
        if self.key_metadata not in ("float32", "float16"):
            raise InvalidArgumentError(
                f"key_metadata must be 'float32' or 'float16', got {self.key_metadata!r}."
            )
        if self.group_size < 1:
            raise InvalidArgumentError(f"group_size must be at least 1, got {self.group_size}.")

    def encode(self, keys: jax.Array, values: jax.Array, centres: Centres) -> Int8Int4Codes:
        del centres  # the format has offsets of its own
        d = keys.shape[-1]
        if d % 2 or d % self.group_size:
            raise InvalidArgumentError(
                f"head dim {d} must be even and a multiple of group_size={self.group_size}; "
                "choose a group_size that divides it."
            )
        meta = jnp.dtype(self.key_metadata)
        low, high = keys.min(-2), keys.max(-2)  # [..., d]
        # Halves first: max - min of bfloat16 originals may exceed float32. Halving is exact, so that no contraction of
        # operations can make two evaluations of sigma (stored, fingerprinted) differ.
        sigma = num.normal_or_zero(_saturate((0.5 * high - 0.5 * low) / 127.5, meta))
        # A constant channel has sigma = 0 and is carried by z alone, which must then be exact.
        zero = _saturate(jnp.where(sigma == 0, low, low + 128 * sigma.astype(jnp.float32)), meta)
        step, offset = sigma.astype(jnp.float32)[..., None, :], zero.astype(jnp.float32)[..., None, :]
        ratio = (keys - offset) / jnp.where(step == 0, 1.0, step)
        codes = jnp.clip(jnp.round(ratio), -128, 127).astype(jnp.int8)
        residual = jnp.abs(keys - _affine(codes, step, offset))
        reach = jnp.where(residual == 0, 0.0, residual / (0.5 * step))
        v_codes, v_scale, v_zero = self._encode_values(values)
        return Int8Int4Codes(
            k_codes=codes,
            k_scale=sigma,
            k_zero=zero,
            # Two float32 decodes may differ by an ulp of the offset: in units of sigma/2.
            k_reach=num.round_up_bf16(
                jnp.where(step == 0, reach, reach + 8 * num.U * (jnp.abs(offset) + 128 * step) / step).max((-2, -1))
                * num.NORM_SLACK
            ),
            v_codes=v_codes,
            v_scale=v_scale,
            v_zero=v_zero,
        )

    def _encode_values(self, values: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        *lead, d = values.shape
        grouped = values.reshape(*lead, d // self.group_size, self.group_size)
        low, high = grouped.min(-1), grouped.max(-1)
        scale = num.normal_or_zero(_saturate((0.5 * high - 0.5 * low) / 7.5, jnp.float16))
        zero = _saturate(low, jnp.float16)
        step, offset = scale.astype(jnp.float32)[..., None], zero.astype(jnp.float32)[..., None]
        ratio = (grouped - offset) / jnp.where(step == 0, 1.0, step)
        codes = jnp.clip(jnp.round(ratio), 0, 15).astype(jnp.uint8).reshape(*lead, d)
        return codes[..., : d // 2] | codes[..., d // 2 :] << 4, scale, zero

    def decode_keys(self, codes: Int8Int4Codes, centres: Centres) -> jax.Array:
        del centres
        step = codes.k_scale.astype(jnp.float32)[..., None, :]
        return _affine(codes.k_codes, step, codes.k_zero.astype(jnp.float32)[..., None, :])

    def decode_values(self, codes: Int8Int4Codes, centres: Centres) -> jax.Array:
        del centres
        both = jnp.concatenate([codes.v_codes & 15, codes.v_codes >> 4], -1)
        grouped = both.reshape(*both.shape[:-1], -1, self.group_size)
        step = codes.v_scale.astype(jnp.float32)[..., None]
        offset = codes.v_zero.astype(jnp.float32)[..., None]
        return _affine(grouped, step, offset).reshape(both.shape)

    def decode_slack(
        self, codes: Int8Int4Codes, centres: Centres, doubt: Centres
    ) -> tuple[jax.Array, jax.Array]:
        """`4 u` times the norm of `|z| + 128 sigma` (keys) and of `|zero| + 15 scale` (values)."""
        del centres, doubt
        k = jnp.abs(codes.k_zero.astype(jnp.float32)) + 128 * codes.k_scale.astype(jnp.float32)
        k_slack = jnp.broadcast_to(num.norm_up(k)[..., None], codes.k_codes.shape[:-1])
        v = jnp.abs(codes.v_zero.astype(jnp.float32)) + 15 * codes.v_scale.astype(jnp.float32)
        v_slack = num.norm_up(v) * self.group_size**0.5
        return 4 * num.U * k_slack, 4 * num.U * v_slack * num.NORM_SLACK

    def channel_bound(self, abs_q: jax.Array, codes: Int8Int4Codes) -> jax.Array:
        """`0.5 sum_c |q_c| sigma_c` times the measured reach (1 when no code saturated or rounded badly)."""
        half = 0.5 * codes.k_scale.astype(jnp.float32)  # [..., NB, d]
        bound = jnp.einsum("...gd,...nd->...gn", abs_q, half, precision=lax.Precision.HIGHEST)
        # 0 * inf: a channel that is not constant but has sigma = 0 makes the reach infinite.
        reach = codes.k_reach.astype(jnp.float32)[..., None, :]
        return jnp.where(jnp.isfinite(reach), bound * reach * (1 + 2.0**-10), jnp.inf)

    def paper_step_norm(self, codes: Int8Int4Codes) -> jax.Array:
        return 0.5 * num.norm_up(codes.k_scale.astype(jnp.float32))


def _affine(codes: jax.Array, step: jax.Array, offset: jax.Array) -> jax.Array:
    return codes.astype(jnp.float32) * step + offset


def _saturate(x: jax.Array, dtype) -> jax.Array:
    """Cast to `dtype`, to its largest number where x is beyond it: a code that is far off has a large but
    finite measured error, an infinite one would take the layer down."""
    top = float(jnp.finfo(dtype).max)
    return num.cast(jnp.clip(x, -top, top), dtype)
