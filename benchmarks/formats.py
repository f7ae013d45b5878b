"""The formats that the study compares, as overrides of `Policy.budget`, and a codec that only the study has."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from certjax import codecs
from certjax.codecs.base import HeadStats, Level
from certjax.codecs.planes import Planes, PlanesCodes
from pallas_kernels import numerics as num

PAPER = dict(codec="int8_int4", annotations="bfloat16", spectral=False)
"""The paper's format as it is, with the centred bound and the windows of the budget preset."""

FORMATS: dict[str, dict] = {
    "planes 8+4 / 4+2 (default)": {},
    "int8_int4": PAPER,
    "int8_int4, FP16 metadata": {**PAPER, "key_metadata": "float16"},
    "int8_int4, g=8": {**PAPER, "group_size": 8},
    "int8_int4, g=32": {**PAPER, "group_size": 32},
    "int8_int4, spectral": {**PAPER, "spectral": True},
    "int8_int8": {**PAPER, "codec": "int8_int8"},
    "fp8_e4m3, a scale a tensor": {"codec": "fp8_e4m3"},
    "fp8_e4m3, a scale a head": {"codec": "fp8_e4m3", "fp8_scale": "head"},
    "KIVI-like INT4": {"codec": "kivi_int4", "key_metadata": "float16"},
    "KIVI-like INT2": {"codec": "kivi_int2", "key_metadata": "float16"},
    "KIVI-like INT4, B=32": {"codec": "kivi_int4", "key_metadata": "float16", "block_size": 32},
    "planes 8+2 / 4, whole": {"key_planes": (8, 2), "value_planes": (4,), "refine": False},
    "planes 8+2 / 4": {"key_planes": (8, 2), "value_planes": (4,)},
    "planes 8+2 / 4+2": {"key_planes": (8, 2)},
    "planes 8 / 4": {"key_planes": (8,), "value_planes": (4,)},
    "planes 8+4 / 4": {"value_planes": (4,)},
    "planes 8+4 / 4+4": {"value_planes": (4, 4)},
    "planes 8+4 / 2+2+2": {"value_planes": (2, 2, 2)},
    "planes 4+4+4 / 4+2": {"key_planes": (4, 4, 4)},
    "planes 8+8 / 8+8": {"key_planes": (8, 8), "value_planes": (8, 8)},
    "planes, whole": {"refine": False},
    "planes, not rotated": {"rotate": False},
    "planes, not centred": {"centre": "zero"},
    "planes, all values centred": {"centre": "mean"},
    "planes, companded 1.25": {"codec": "companded"},
    "planes, companded 1.5": {"codec": "companded_more"},
    "planes, not spectral": {"spectral": False},
    "planes, equal allotment": {"allotment": "equal"},
    "int8_int4, equal allotment": {**PAPER, "allotment": "equal"},
    "planes, values never skipped": {"skip_values": False},
    "planes, no windows": {"sink_tokens": 0, "recent_tokens": 0},
    "planes, sink 16": {"recent_tokens": 0},
    "planes, recent 64": {"recent_tokens": 64},
    "planes, recent 256": {"recent_tokens": 256},
    "planes, recent 512": {"recent_tokens": 512},
    "planes, sink 64": {"sink_tokens": 64},
}

MAIN = ("planes 8+4 / 4+2 (default)", "int8_int4", "planes 8+2 / 4, whole", "fp8_e4m3, a scale a tensor")
"""Measured at every tolerance, the others at 5%."""


SHORT = 1 - 2.0**-10


@dataclasses.dataclass(frozen=True)
class Companded(Planes):
    """`planes` with codes that are denser around zero: the grid is uniform in `|y|^(1/power)`."""

    power: float = 1.25

    def encode(self, keys: jax.Array, values: jax.Array, stats: HeadStats) -> PlanesCodes:
        codes = {}
        for name, x, centre in (("k", keys, stats.key_centre), ("v", values, stats.value_centre)):
            y = self.to_basis(x - centre[..., None, None, :])
            peak = num.round_up_bf16(jnp.abs(y).max(-1)).astype(jnp.float32)  # as it is going to be stored
            t = y / jnp.where(peak > 0, peak, 1.0)[..., None]
            # Short of 1, so that the uniform grid's scale is the power of two that decoding takes for granted.
            codes[name] = SHORT * jnp.sign(t) * jnp.abs(t) ** (1 / self.power), peak
        uniform = super().encode(
            *(self.from_basis(codes[n][0]) for n in ("k", "v")),
            HeadStats(jnp.zeros_like(stats.key_centre), jnp.zeros_like(stats.value_centre)),
        )
        # The scale a token keeps is that of its own numbers; the grid's is the same for all.
        return uniform.replace(
            k_scale=codes["k"][1].astype(jnp.bfloat16), v_scale=codes["v"][1].astype(jnp.bfloat16)
        )

    def _dequantize(self, planes, scale: jax.Array, widths: tuple[int, ...], level: Level) -> jax.Array:
        half = 2.0 ** (sum(widths) - 1)
        t = super()._dequantize(planes, jnp.full(scale.shape, 1 / half, jnp.bfloat16), widths, level)
        t = t / SHORT
        return jnp.sign(t) * jnp.abs(t) ** self.power * scale.astype(jnp.float32)[..., None]

    def _slack(self, y: jax.Array, centre: jax.Array, doubt: jax.Array) -> jax.Array:
        """A power may be evaluated differently in another program: 2^-18 of the vector."""
        return super()._slack(y, centre, doubt) + 2.0**-18 * num.norm_up(y)


def register() -> None:
    """Make the study's own codec known to policies."""
    codecs.REGISTRY.setdefault("companded", Companded)
    codecs.REGISTRY.setdefault("companded_more", functools.partial(Companded, power=1.5))

