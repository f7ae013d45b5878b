"""`planes`: centred, rotated keys and values, one scale a token, codes split into bit planes.

A code of `b` bits is the index of the cell of a uniform grid that holds the number, decoded to the cell's middle:
dropping the low plane leaves the code of a coarser grid with the same range. All the bytes that the paper's
format spends on scales and offsets become bits of codes (docs/formats.md).
"""

from __future__ import annotations

import dataclasses
import itertools

import flax.struct
import jax
import jax.numpy as jnp

from certjax.codecs import packing, rotation
from certjax.codecs.base import Doubt, HeadStats, Level
from certjax.errors import InvalidArgumentError
from pallas_kernels import numerics as num

WIDTHS = (1, 2, 4, 8)


@flax.struct.dataclass
class PlanesCodes:
    """One block or many: every shape below may carry leading axes (batch, KV heads, blocks)."""

    k_planes: tuple[jax.Array, ...]  # [B, d w/8] int8 each, most significant first
    k_scale: jax.Array  # [B] bfloat16, width of a cell
    v_planes: tuple[jax.Array, ...]  # [d, B w/8] int8: tokens along the bytes, as the sum over tokens reads them
    v_scale: jax.Array  # [B] bfloat16


@dataclasses.dataclass(frozen=True)
class Planes:
    """The codec.

    Attributes
    ----------
    key_planes, value_planes
        Widths in bits, most significant first, each 1, 2, 4 or 8, at most 16 in all.
    refine
        Whether the codes can be read plane by plane, each precision with annotations of its own, or only whole.
    rotate
        Whether vectors are turned before they are quantized.

    Raises
    ------
    InvalidArgumentError
        On other widths.
    """

    key_planes: tuple[int, ...] = (8, 4)
    value_planes: tuple[int, ...] = (4, 2)
    refine: bool = True
    rotate: bool = True
    name: str = dataclasses.field(default="planes", init=False)
    centred = True
    scaled = False

    def __post_init__(self):
        for name in ("key_planes", "value_planes"):
            widths = getattr(self, name)
            if not widths or any(w not in WIDTHS for w in widths) or sum(widths) > 16:
                raise InvalidArgumentError(
                    f"{name} must be widths out of {WIDTHS} that add up to at most 16, got {widths}."
                )

    @property
    def key_levels(self) -> int:
        return len(self.key_planes) if self.refine else 1

    @property
    def value_levels(self) -> int:
        return len(self.value_planes) if self.refine else 1

    def encode(self, keys: jax.Array, values: jax.Array, stats: HeadStats) -> PlanesCodes:
        d, size = keys.shape[-1], keys.shape[-2]
        _require_whole_bytes("head dim", d, "key_planes", self.key_planes)
        _require_whole_bytes("block_size", size, "value_planes", self.value_planes)
        k_codes, k_scale = _quantize(self.to_basis(keys - _of_blocks(stats.key_centre)), sum(self.key_planes))
        v_codes, v_scale = _quantize(self.to_basis(values - _of_blocks(stats.value_centre)), sum(self.value_planes))
        k_planes, v_planes = _split(k_codes, self.key_planes), _split(v_codes.swapaxes(-1, -2), self.value_planes)
        return PlanesCodes(k_planes=k_planes, k_scale=k_scale, v_planes=v_planes, v_scale=v_scale)

    def keys(self, codes: PlanesCodes, level: Level) -> jax.Array:
        return self._dequantize(codes.k_planes, self.key_planes, level) * _of_tokens(codes.k_scale)

    def values(self, codes: PlanesCodes, level: Level) -> jax.Array:
        return self._dequantize(codes.v_planes, self.value_planes, level).swapaxes(-1, -2) * _of_tokens(codes.v_scale)

    def _dequantize(self, planes, widths: tuple[int, ...], level: Level) -> jax.Array:
        """The middle of each cell, `code - 2^(b-1) + cell/2`, in a grid of `cell` finest steps."""
        bits = sum(widths)
        left = [bits - used for used in itertools.accumulate(widths)]
        cells = [2.0**n for n in left] if self.refine else [1.0]
        per_block = not isinstance(level, int)
        codes = jnp.int32(0)
        for i, (plane, width, n) in enumerate(zip(planes, widths, left, strict=True)):
            part = packing.unpack(packing.from_signed(plane, width), width) << n
            if i and self.refine:
                if not per_block and i > level:
                    break
                part = jnp.where(level[..., None, None] >= i, part, 0) if per_block else part
            codes = codes + part
        half = 0.5 * (jnp.asarray(cells, jnp.float32)[level][..., None, None] if per_block else cells[level])
        return codes.astype(jnp.float32) - (2.0 ** (bits - 1) - half)

    def to_basis(self, x: jax.Array) -> jax.Array:
        return rotation.rotate(x) if self.rotate else x

    def from_basis(self, y: jax.Array) -> jax.Array:
        return rotation.unrotate(y) if self.rotate else y

    def rounding(self, d: int) -> float:
        return rotation.rounding(d) if self.rotate else 0.0

    def key_slack(self, codes: PlanesCodes, level: int, stats: HeadStats, doubt: Doubt) -> jax.Array:
        """Twice the rounding of a decode, and the doubt of the centre."""
        return self._slack(self.keys(codes, level), stats.key_centre, doubt.key_centre)

    def value_slack(self, codes: PlanesCodes, level: int, stats: HeadStats, doubt: Doubt) -> jax.Array:
        """Twice the rounding of a decode, and the doubt of the centre."""
        return self._slack(self.values(codes, level), stats.value_centre, doubt.value_centre)

    def _slack(self, y: jax.Array, centre: jax.Array, doubt: jax.Array) -> jax.Array:
        relative = 2 * (self.rounding(y.shape[-1]) + num.gamma(3))
        return relative * (num.norm_up(y) + num.norm_up(centre)[..., None, None]) + doubt[..., None, None]

    def steps(self, codes: PlanesCodes) -> tuple[jax.Array, jax.Array]:
        return codes.k_scale.astype(jnp.float32), codes.v_scale.astype(jnp.float32)

    def channel_bound(self, abs_q: jax.Array, codes: PlanesCodes) -> None:
        return None

    def paper_step_norm(self, codes: PlanesCodes) -> None:
        return None

    def key_bytes(self, size: int, d: int) -> tuple[int, ...]:
        return self._bytes(self.key_planes, size, d)

    def value_bytes(self, size: int, d: int) -> tuple[int, ...]:
        return self._bytes(self.value_planes, size, d)

    def _bytes(self, widths: tuple[int, ...], size: int, d: int) -> tuple[int, ...]:
        by_plane = tuple(size * (d * bits // 8 + 2) for bits in itertools.accumulate(widths))
        return by_plane if self.refine else by_plane[-1:]


def _of_blocks(centre: jax.Array) -> jax.Array:
    """`[..., d]` of a KV head, for its blocks: `[..., 1, 1, d]`."""
    return centre[..., None, None, :]


def _of_tokens(scale: jax.Array) -> jax.Array:
    return scale.astype(jnp.float32)[..., None]


def _quantize(y: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """Codes of `y` [..., B, d] int32, and the width of a cell [..., B]."""
    half = 2 ** (bits - 1)
    scale = num.normal_or_zero(num.round_up_bf16(jnp.abs(y).max(-1) / half))  # 0: the token is its centre
    step = scale.astype(jnp.float32)
    cell = jnp.floor(y / jnp.where(step == 0, 1.0, step)[..., None])
    return (jnp.clip(cell, -half, half - 1) + half).astype(jnp.int32), scale


def _split(codes: jax.Array, widths: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Planes of `codes` [..., n], packed along the last axis."""
    planes, left = [], sum(widths)
    for width in widths:
        left -= width
        planes.append(packing.to_signed(packing.pack((codes >> left) & (2**width - 1), width), width))
    return tuple(planes)


def _require_whole_bytes(name: str, n: int, field: str, widths: tuple[int, ...]) -> None:
    if any(n * w % 8 for w in widths):
        raise InvalidArgumentError(f"{name} {n} does not fill whole bytes of {field} {widths}; choose wider planes.")
