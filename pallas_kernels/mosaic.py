"""What the Mosaic GPU kernels share: a tile's shape in shared memory, and the products over one tile of originals.

A tile is one block of `TILE` tokens of one KV head; the query heads of its group are padded to the `COLUMNS` columns of
a matrix instruction.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.query import COLUMNS

TILE = 128
"""Tokens of a block that the kernels read."""

PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


def swizzled(bits: int, minor: int) -> tuple:
    """Layout of an array with `minor` columns of `bits` bits for the matrix unit."""
    swizzle = plgpu.find_swizzle(minor * bits)
    return plgpu.TilingTransform((8, 8 * swizzle // bits)), plgpu.SwizzleTransform(swizzle)


def tile_ref(shape: tuple[int, ...], dtype) -> plgpu.SMEM:
    """A shared-memory operand of the matrix unit."""
    return plgpu.SMEM(shape, dtype, transforms=swizzled(jnp.dtype(dtype).itemsize * 8, shape[-1]))


def over_rows(x: jax.Array, rows: int) -> jax.Array:
    """`[COLUMNS]` for every row: [rows, COLUMNS]."""
    return lax.broadcast_in_dim(x, (rows, COLUMNS), [1])


def over_columns(x: jax.Array) -> jax.Array:
    """`[rows]` for every column: [rows, COLUMNS]."""
    return lax.broadcast_in_dim(x, (x.shape[0], COLUMNS), [0])


def integer_dot(keys, q_high, q_low) -> jax.Array:
    """`256 k.q_high + k.q_low`, exact: int8 [TILE, d], [COLUMNS, d] twice -> float32 [TILE, COLUMNS]."""

    def dot(high, low):
        plgpu.wgmma(high, keys, q_high.transpose((1, 0)))
        plgpu.wgmma(low, keys, q_low.transpose((1, 0)))
        plgpu.wgmma_wait(0)
        return high[...], low[...]

    accumulator = plgpu.ACC((TILE, COLUMNS), jnp.int32)
    high, low = pl.run_scoped(dot, accumulator, accumulator)
    return (high * 256 + low).astype(jnp.float32)


def store_weights(weights: jax.Array, high_ref, low_ref) -> None:
    """Split `weights` [TILE, COLUMNS] float32 into two bfloat16 that add up to it within 2^-17, each stored turned."""
    high = weights.astype(jnp.bfloat16)
    low = (weights - high.astype(jnp.float32)).astype(jnp.bfloat16)
    high_ref.transpose((1, 0))[...] = high
    low_ref.transpose((1, 0))[...] = low
    plgpu.commit_smem()


def weights_ref() -> plgpu.SMEM:
    """Weights of a tile, turned, sliceable by 32 tokens."""
    return plgpu.SMEM(
        (COLUMNS, TILE), jnp.bfloat16, transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(64))
    )


def weighted(parts: list, weights: tuple) -> list:
    """Pairs to multiply: each part of a tile's values, tokens in order, with its tokens' weights."""
    size = TILE // len(parts)
    return [
        (part, ref.at[:, pl.ds(i * size, size)].transpose((1, 0))) for i, part in enumerate(parts) for ref in weights
    ]


def accumulate(acc: jax.Array, products) -> jax.Array:
    """`acc + sum of a @ b` over pairs of operands. `acc`: [M, COLUMNS] float32."""

    def add(ref):
        for a, b in products:
            plgpu.wgmma(ref, a, b)
        plgpu.wgmma_wait(0)

    return pl.run_state(add)(plgpu.ACC.init(acc))


def sum_products(rows: int, products) -> jax.Array:
    """`sum of a @ b`: [rows, COLUMNS] float32."""

    def add(ref):
        for a, b in products:
            plgpu.wgmma(ref, a, b)
        plgpu.wgmma_wait(0)
        return ref[...]

    return pl.run_scoped(add, plgpu.ACC((rows, COLUMNS), jnp.float32))


def slots_ref(shape: tuple[int, ...], dtype, slots: int = 2) -> plgpu.SMEM:
    """`slots` operands of the matrix unit."""
    transforms = swizzled(jnp.dtype(dtype).itemsize * 8, shape[-1])
    batched = tuple(plgpu.batch_transform(t, 1) if hasattr(plgpu, "batch_transform") else t for t in transforms)
    return plgpu.SMEM((slots, *shape), dtype, transforms=batched)


def fields(packed: jax.Array, width: int) -> list[jax.Array]:
    """The codes in a byte of 8/width two's complement fields, lowest first, times `2^(8 - width)`: bfloat16, exact."""
    fields = []
    for low in range(0, 8 - width, width):
        top = 1 << (low + width - 1)
        code = (packed & jnp.int8((2**width - 1) << low)) ^ jnp.int8(top)  # counted from 0
        fields.append(code.astype(jnp.bfloat16) * jnp.bfloat16(2 ** (8 - width - low)) - jnp.bfloat16(128))
    return [*fields, (packed & jnp.int8(-(2 ** (8 - width)))).astype(jnp.bfloat16)]


def store_sums(w: jax.Array, nu, target) -> None:
    """`sum w`, `sum w share`, `sum w^2` over a tile: [3, COLUMNS]. `w`: [TILE, COLUMNS], `nu`: [TILE] uint8."""
    target[0] = w.sum(axis=0)
    target[1] = (w * over_columns(nu[...].astype(jnp.float32))).sum(axis=0)
    target[2] = (w * w).sum(axis=0)


FLAGS = 256
"""Longest row that one copy takes."""


def rows_of_flags(chosen: jax.Array) -> jax.Array:
    """`[H, n]` int32 -> [H, r, w], padded with 0 to whole rows of whole 16 bytes."""
    n = chosen.shape[1]
    width = min(FLAGS, n + -n % 4)
    return jnp.pad(chosen, ((0, 0), (0, -n % width))).reshape(chosen.shape[0], -1, width)


def list_chosen(flags, order, split: jax.Array, splits: int) -> jax.Array:
    """Write the tiles of a program whose flags are set to `order`; returns how many. `flags`: [r, w] int32 of 0 and 1.

    Program `split` of `splits` looks at tiles `split`, `split + splits` ...: what lies together is shared out.
    """
    rows, width = flags.shape
    n = rows * width

    def visit(i, count):
        tile = split + i * splits
        flag = flags[tile // width, tile % width]

        @pl.when(flag > 0)
        def _():
            order[count] = tile

        return count + flag

    count = lax.fori_loop(0, (n - split + splits - 1) // splits, visit, jnp.int32(0))
    plgpu.commit_smem()  # every thread has written before any reads
    return count
