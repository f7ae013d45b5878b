"""`planes`: centred, rotated keys and values, one scale a token, codes split into bit planes.

A code of `b` bits is the index of the cell of a uniform grid that holds the number, decoded to the cell's middle:
dropping the low plane leaves the code of a coarser grid with the same range. All the bytes that the paper's
format spends on scales and offsets become bits of codes (docs/bounds.md, section 2).
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from certjax.codecs.base import Centres
from certjax.codecs.rotation import rotate, rounding, unrotate
from certjax.errors import InvalidArgumentError
from pallas_kernels import numerics as num

WIDTHS = (1, 2, 4, 8)


@flax.struct.dataclass
class PlanesCodes:
    """One block or many: every shape below may carry leading axes (batch, KV heads, blocks)."""

    k_planes: tuple[jax.Array, ...]  # [B, d w/8] uint8 each, most significant first
    k_scale: jax.Array  # [B] bfloat16, width of a cell
    v_planes: tuple[jax.Array, ...]  # [B, d w/8] uint8
    v_scale: jax.Array  # [B] bfloat16


@dataclasses.dataclass(frozen=True)
class Planes:
    """The codec. `key_planes` and `value_planes` are the widths in bits, each 1, 2, 4 or 8.

    Raises
    ------
    InvalidArgumentError
        On other widths, or more than 16 bits in all.
    """

    key_planes: tuple[int, ...] = (8, 4)
    value_planes: tuple[int, ...] = (4, 2)
    name: str = dataclasses.field(default="planes", init=False)

    def __post_init__(self):
        for name in ("key_planes", "value_planes"):
            widths = getattr(self, name)
            if not widths or any(w not in WIDTHS for w in widths) or sum(widths) > 16:
                raise InvalidArgumentError(
                    f"{name} must be widths out of {WIDTHS} that add up to at most 16, got {widths}."
                )

    def encode(self, keys: jax.Array, values: jax.Array, centres: Centres) -> PlanesCodes:
        k_planes, k_scale = _quantize(rotate(keys - _of_blocks(centres.keys)), self.key_planes)
        v_planes, v_scale = _quantize(rotate(values - _of_blocks(centres.values)), self.value_planes)
        return PlanesCodes(k_planes=k_planes, k_scale=k_scale, v_planes=v_planes, v_scale=v_scale)

    def decode_keys(self, codes: PlanesCodes, centres: Centres) -> jax.Array:
        return unrotate(_dequantize(codes.k_planes, codes.k_scale, self.key_planes)) + _of_blocks(centres.keys)

    def decode_values(self, codes: PlanesCodes, centres: Centres) -> jax.Array:
        return unrotate(_dequantize(codes.v_planes, codes.v_scale, self.value_planes)) + _of_blocks(centres.values)

    def decode_slack(
        self, codes: PlanesCodes, centres: Centres, doubt: Centres
    ) -> tuple[jax.Array, jax.Array]:
        """Twice the rounding of `unrotate` and of the addition of the centre, and the doubt of the centre."""

        def slack(planes, scale, widths, centre, doubt):
            y = num.norm_up(_dequantize(planes, scale, widths))
            relative = 2 * (rounding(_head_dim(planes, widths)) + num.gamma(3))
            return relative * (y + num.norm_up(centre)[..., None, None]) + doubt[..., None, None]

        return (
            slack(codes.k_planes, codes.k_scale, self.key_planes, centres.keys, doubt.keys),
            slack(codes.v_planes, codes.v_scale, self.value_planes, centres.values, doubt.values),
        )

    def channel_bound(self, abs_q: jax.Array, codes: PlanesCodes) -> None:
        return None

    def paper_step_norm(self, codes: PlanesCodes) -> None:
        return None


def _of_blocks(centre: jax.Array) -> jax.Array:
    """`[..., d]` of a KV head, for its blocks: `[..., 1, 1, d]`."""
    return centre[..., None, None, :]


def _head_dim(planes: tuple[jax.Array, ...], widths: tuple[int, ...]) -> int:
    return planes[0].shape[-1] * 8 // widths[0]


def _quantize(y: jax.Array, widths: tuple[int, ...]) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Planes of the codes of `y` [..., B, d], and the width of a cell [..., B]."""
    d, bits = y.shape[-1], sum(widths)
    if any(d * w % 8 for w in widths):
        raise InvalidArgumentError(f"head dim {d} does not fill whole bytes of planes {widths}; choose wider planes.")
    half = 2 ** (bits - 1)
    scale = num.normal_or_zero(num.round_up_bf16(jnp.abs(y).max(-1) / half))  # 0: the token is its centre
    step = scale.astype(jnp.float32)
    cell = jnp.floor(y / jnp.where(step == 0, 1.0, step)[..., None])
    codes = (jnp.clip(cell, -half, half - 1) + half).astype(jnp.int32)
    planes, left = [], bits
    for width in widths:
        left -= width
        planes.append(_pack((codes >> left) & (2**width - 1), width))
    return tuple(planes), scale


def _dequantize(planes: tuple[jax.Array, ...], scale: jax.Array, widths: tuple[int, ...]) -> jax.Array:
    """The middle of each cell: `(code - 2^(b-1) + 1/2) scale`, exact in float32."""
    codes = jnp.int32(0)
    for plane, width in zip(planes, widths, strict=True):
        codes = (codes << width) | _unpack(plane, width)
    middle = codes.astype(jnp.float32) - (2.0 ** (sum(widths) - 1) - 0.5)
    return middle * scale.astype(jnp.float32)[..., None]


def _pack(codes: jax.Array, width: int) -> jax.Array:
    """`8/width` codes a byte: [..., d] -> [..., d width/8] uint8. Channel c is in byte c mod (d width/8)."""
    slots = codes.reshape(*codes.shape[:-1], 8 // width, -1)
    shifts = jnp.arange(8 // width, dtype=jnp.int32)[:, None] * width
    return (slots << shifts).sum(-2).astype(jnp.uint8)


def _unpack(plane: jax.Array, width: int) -> jax.Array:
    """The inverse of `_pack`: int32."""
    shifts = jnp.arange(8 // width, dtype=jnp.int32)[:, None] * width
    slots = (plane[..., None, :].astype(jnp.int32) >> shifts) & (2**width - 1)
    return slots.reshape(*plane.shape[:-1], -1)
