"""Queries as the kernels multiply them: 24-bit fixed point in three bytes, with every factor of a score folded in.

A score is taken in units of log 2 and less a reference `rho` that is chosen before anything is scored, so that the
weights `w_t = 2^(x_t)` of all tiles have one scale and are added up as they come (docs/kernels.md).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from pallas_kernels import numerics as num

LOG2_E = 1.4426950408889634
MAX_GROUP = 8
"""Most query heads that share a KV head."""


def columns(group: int) -> int:
    """Columns of the matrix instructions' operands: the query heads of a group, padded to 4 or 8, twice (8 is the
    narrowest). The repetition is where the lower halves of weights go."""
    return 8 if group <= 4 else 16


def distinct(x: jax.Array, axis: int) -> jax.Array:
    """The first half of the columns along `axis`."""
    return jax.lax.slice_in_dim(x, 0, x.shape[axis] // 2, axis=axis)


def in_two_halves(w: jax.Array) -> jax.Array:
    """`[..., G]` float32 as bfloat16 `[..., 2 G]`: rounded, and what rounding left; they add up to it within 2^-17."""
    high = jax.lax.reduce_precision(w, 8, 7)  # XLA may drop a conversion to bfloat16 and back
    return jnp.concatenate([high, w - high], -1).astype(jnp.bfloat16)


def folded(x: jax.Array) -> jax.Array:
    """Products with weights in two halves, added up: `[..., 2 G]` -> `[..., G]`."""
    return sum(jnp.split(x, 2, axis=-1))


def row_of_flags(n: int) -> tuple[int, int]:
    """Length of a row of int32 that one copy takes, whole 16 bytes and at most 256; and of whole rows for `n`."""
    width = min(256, n + -n % 4)
    return width, n + -n % width


def twice(x: jax.Array) -> jax.Array:
    """`[..., G]` as kernels return sums, columns repeated: `[..., C]`."""
    return jnp.concatenate([x, x], -1)


def whole(x: jax.Array) -> jax.Array:
    """`[..., G]` as kernels return products, in two halves to be added up: `[..., C]`."""
    return jnp.concatenate([x, jnp.zeros_like(x)], -1)


PARTS = 3
"""Bytes of a fixed-point query, the most significant first."""

BITS = 22
"""The largest element of a query has at least 2^(BITS - 1) steps and less than 2^BITS."""


@struct.dataclass
class Fixed:
    """`scale * (65536 parts[0] + 256 parts[1] + parts[2])`, and how far it is from the query."""

    parts: jax.Array  # [H, PARTS, C, d] int8
    scale: jax.Array  # [H, C] float32, a power of two
    error: jax.Array  # [H, C] float32, ||q - fixed||, rounded up


def fixed_point(q: jax.Array, largest: jax.Array) -> Fixed:
    """`q`: [H, C, d] float32, `largest`: [H, C] its largest element by size."""
    # A power of two, so that quotients are exact. None is so small that its reciprocal overflows: elements are below
    # 2^-88 then.
    k = num.exponent_above(jnp.maximum(largest, 2.0**-88)) - BITS
    scale = num.power_of_two(k)
    steps = jnp.round(q * num.power_of_two(-k)[..., None]).astype(jnp.int32)
    high = (steps + 32896) >> 16  # 32896 = 128 * 257: what is left is within two bytes
    rest = steps - 65536 * high
    middle = (rest + 128) >> 8
    parts = jnp.stack([high, middle, rest - 256 * middle], 1).astype(jnp.int8)
    return Fixed(parts, scale, scale * (q.shape[-1] ** 0.5 * 0.5 * (1 + 2.0**-20)))  # half a step a channel


def together(parts) -> jax.Array:
    """The number that three bytes, or products with them, stand for: float32."""
    high, middle, low = (x.astype(jnp.float32) for x in parts)
    return (high * 256 + middle) * 256 + low


def value(x: Fixed) -> jax.Array:
    """The fixed-point query as float32 `[H, C, d]`."""
    return together(jnp.moveaxis(x.parts, 1, 0)) * x.scale[..., None]


UNIT, HALF, SHIFT, LOW_UNIT, HALF_FINE, UNIT_EXACT, SHIFT_EXACT = range(NUMBERS := 7)
"""Rows of `Operands.numbers`. The score of a token, in units of log 2 and less the reference, is
`(UNIT q.k + HALF) scale + SHIFT` for 8-bit keys, `(UNIT q.k + LOW_UNIT q.low + HALF_FINE) scale + SHIFT` for 12-bit
keys, and `UNIT_EXACT q.k + SHIFT_EXACT` for original keys."""


@struct.dataclass
class Operands:
    """The queries of a step as kernels take them, C = 2 G columns."""

    parts: jax.Array  # [H, PARTS, C, d] int8, of the turned queries
    wide: jax.Array  # [H, 2 PARTS, C, d] bfloat16, the same, and those of the queries as they are
    numbers: jax.Array  # [H, 7, C] float32

    def row(self, i: int) -> jax.Array:
        """A row of numbers, of the distinct columns, for every token: [H, 1, G]."""
        return distinct(self.numbers, 2)[:, None, i]


def operands(turned: Fixed, plain: Fixed, rows: list[jax.Array]) -> Operands:
    """Repeats the columns. `rows`: of `numbers`, [H, G] each."""
    parts = [*jnp.unstack(turned.parts, axis=1), *jnp.unstack(plain.parts, axis=1)]  # [H, G, d]

    def repeated(x):
        return jnp.stack([jnp.concatenate([y, y], 1) for y in x], 1)

    return Operands(repeated(parts[:PARTS]), repeated(parts).astype(jnp.bfloat16), repeated(rows))
