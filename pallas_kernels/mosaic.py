"""What the Mosaic GPU kernels share: a tile's shape in shared memory, and the products over one tile of originals.

A tile is one block of `TILE` tokens of one KV head. The query heads of its group, padded to G of 4 or 8, come twice:
they are the `C = 2 G` columns of a matrix instruction (`pallas_kernels/query.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.levels import CHUNK, TILE
from pallas_kernels.query import PARTS, row_of_flags, together

PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


def swizzled(bits: int, minor: int) -> tuple:
    """Layout of an array with `minor` columns of `bits` bits for the matrix unit."""
    swizzle = plgpu.find_swizzle(minor * bits)
    return plgpu.TilingTransform((8, 8 * swizzle // bits)), plgpu.SwizzleTransform(swizzle)


def tile_ref(shape: tuple[int, ...], dtype, slots: int | None = None) -> plgpu.SMEM:
    """A shared-memory operand of the matrix unit; or `slots` of them."""
    return _batched(shape, dtype, swizzled(jnp.dtype(dtype).itemsize * 8, shape[-1]), slots)


def over_rows(x: jax.Array, rows: int) -> jax.Array:
    """`[C]` for every row: [rows, C]."""
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def over_columns(x: jax.Array, columns: int) -> jax.Array:
    """`[rows]` for every column: [rows, columns]."""
    return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def integer_dot(keys, queries) -> jax.Array:
    """`k.q` with the three bytes of a query: int8 [TILE, d], [C, d] thrice -> float32 [TILE, C].

    Each byte's product is exact; float32 rounds their sum.
    """

    def dot(*sums):
        for ref, q in zip(sums, queries, strict=True):
            plgpu.wgmma(ref, keys, q.transpose((1, 0)))
        plgpu.wgmma_wait(0)
        return [ref[...] for ref in sums]

    return together(pl.run_scoped(dot, *[plgpu.ACC((TILE, queries[0].shape[0]), jnp.int32)] * PARTS))


def store_weights(weights: jax.Array, ref) -> None:
    """Weights `[TILE, C]` float32 as `query.in_two_halves` has them, turned: `[C, TILE]` bfloat16. Columns repeat, so
    that each half takes its own."""
    high = weights.astype(jnp.bfloat16).astype(jnp.float32)
    ref.transpose((1, 0))[...] = jnp.where(in_first_half(weights), high, weights - high).astype(jnp.bfloat16)


def in_first_half(x: jax.Array) -> jax.Array:
    """Of the columns, bool."""
    return lax.broadcasted_iota(jnp.int32, x.shape, 1) < x.shape[1] // 2


def weights_ref(columns: int, slots: int | None = None, tokens: int = TILE) -> plgpu.SMEM:
    """Weights of some tokens, turned, sliceable by 32 tokens; or `slots` of them."""
    transforms = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(64))
    return _batched((columns, tokens), jnp.bfloat16, transforms, slots)


def weighted(parts: list, weights) -> list:
    """Pairs to multiply: each part of a tile's values, tokens in order, with its tokens' weights."""
    size = TILE // len(parts)
    return [(part, weights.at[:, pl.ds(i * size, size)].transpose((1, 0))) for i, part in enumerate(parts)]


def sum_products(rows: int, products, interpret) -> jax.Array:
    """`sum of a @ b`: [rows, C] float32. `a` in shared memory or in registers, `b` in shared memory."""
    if interpret:  # the interpreter has no products of what is in registers
        return sum(jnp.dot(a[...].astype(jnp.float32), b[...].astype(jnp.float32)) for a, b in products)

    def add(ref):
        for a, b in products:
            plgpu.wgmma(ref, a, b)
        plgpu.wgmma_wait(0)
        return ref[...]

    return pl.run_scoped(add, plgpu.ACC((rows, products[0][1].shape[1]), jnp.float32))


def _batched(shape: tuple[int, ...], dtype, transforms: tuple, slots: int | None) -> plgpu.SMEM:
    if slots is None:
        return plgpu.SMEM(shape, dtype, transforms=transforms)
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


SUMS = 4
"""Of a tile: `sum w`, `sum w share`, `sum w^2`, `sum w value_scale`. Columns repeat, so that the second half of the
first two takes the same times the key's scale."""


def store_sums(w: jax.Array, scaled: jax.Array, nu, key_scale, target) -> None:
    """`target`: [SUMS, C]. `w`, `scaled`: [TILE, C]; `nu`: [TILE] uint8; `key_scale`: [TILE]."""
    both = jnp.where(in_first_half(w), w, times(w, key_scale))
    target[0] = both.sum(axis=0)
    target[1] = times(both, nu).sum(axis=0)
    target[2] = (w * w).sum(axis=0)
    target[3] = scaled.sum(axis=0)


def times(w: jax.Array, ref) -> jax.Array:
    """`w` [TILE, C] with each token's factor from `ref` [TILE]."""
    return w * over_columns(ref[...].astype(jnp.float32), w.shape[1])


def rows_of_flags(chosen: jax.Array) -> jax.Array:
    """`[H, n]` int32 -> [H, r, w], padded with 0 to whole rows of whole 16 bytes."""
    width, length = row_of_flags(chosen.shape[1])
    return jnp.pad(chosen, ((0, 0), (0, length - chosen.shape[1]))).reshape(chosen.shape[0], -1, width)


def list_chosen(flags, chosen: Callable, order, split: jax.Array, splits: int) -> jax.Array:
    """Write the tiles of a program whose number is `chosen` to `order`; returns how many. `flags`: [r, w] int32.

    Program `split` of `splits` looks at tiles `split`, `split + splits` ...: what lies together is shared out.
    """
    n = flags.shape[0] * flags.shape[1]
    count = _look_through(flags, chosen, order, split, splits, (n - split + splits - 1) // splits, jnp.int32(0))
    plgpu.commit_smem()  # every thread has written before any reads
    return count


def list_in_chunks(flags, summary, here: Callable, chosen: Callable, order, split: jax.Array, splits: int) -> jax.Array:
    """`list_chosen` that passes over chunks whose `summary` is not `here`."""
    n = flags.shape[0] * flags.shape[1]

    def look_at(chunk, count):
        start = chunk * CHUNK
        first = start + lax.rem(split + (splits - lax.rem(start, splits)), splits)
        visits = (jnp.minimum(start + CHUNK, n) - first + splits - 1) // splits
        visits = jnp.where(here(summary[chunk]), visits, 0)
        return _look_through(flags, chosen, order, first, splits, visits, count)

    count = lax.fori_loop(0, -(-n // CHUNK), look_at, jnp.int32(0))
    plgpu.commit_smem()
    return count


def _look_through(flags, chosen: Callable, order, first, step: int, visits, count: jax.Array) -> jax.Array:
    def visit(i, count):
        tile = first + i * step
        taken = chosen(flag_of(flags, tile))

        @pl.when(taken)
        def _():
            order[count] = tile

        return count + jnp.where(taken, jnp.int32(1), jnp.int32(0))

    return lax.fori_loop(0, visits, visit, count)


def flag_of(flags, tile: jax.Array) -> jax.Array:
    """A tile's number in `rows_of_flags`."""
    width = flags.shape[1]
    return flags[tile // width, tile % width]
