"""What the Mosaic GPU kernels share: a tile's shape in shared memory, and the products over one tile of originals.

A tile is one block of `TILE` tokens of one KV head. The query heads of its group, padded to G of 4 or 8, come twice:
they are the `C = 2 G` columns of a matrix instruction (`pallas_kernels/query.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.levels import LOOK, TILE, TILES_READ, pieces_of
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
    """`k.q` with the three bytes of a query: int8 [n, d], [C, d] thrice -> float32 [n, C].

    Each byte's product is exact; float32 rounds their sum.
    """

    def dot(*sums):
        for ref, q in zip(sums, queries, strict=True):
            plgpu.wgmma(ref, keys, q.transpose((1, 0)))
        plgpu.wgmma_wait(0)
        return [ref[...] for ref in sums]

    return together(pl.run_scoped(dot, *[plgpu.ACC((keys.shape[0], queries[0].shape[0]), jnp.int32)] * PARTS))


def zero_of(tile: jax.Array) -> jax.Array:
    """0, of which the compiler does not know it: for a loop over tiles, so that it does not work out beforehand where
    all operands of its matrix instructions lie and keep that in 80 registers, which leaves room for fewer programs."""
    return lax.div(tile, jnp.int32(2**24))


def parts_of(queries, zero=0) -> list:
    """The parts of queries in shared memory, `[PARTS, C, d]`. `zero`: of `zero_of`, in a loop."""
    return [queries.at[zero + i] for i in range(PARTS)]


def store_weights(weights: jax.Array, ref) -> None:
    """Weights `[n, C]` float32 as `query.in_two_halves` has them, turned: `[C, n]` bfloat16. Columns repeat, so
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


HIGH, LOW = (4, 1 / 4), (2, 1 / 64)
"""Planes of values: bits of a code, and what `fields` of them are to be multiplied by, where a value is
`scale (4 high + low)` and an offset."""


def add_values(acc, plane, coding: tuple[int, float], weights, interpret):
    """To ROWS channels each of `acc`, a tile's values by one of their planes, HIGH or LOW."""
    width, unit = coding
    rows = acc[0].shape[0]

    def product(j: int):
        return sum_products(rows, weighted(fields(plane[pl.ds(j * rows, rows)], width), weights), interpret)

    return tuple(part + product(j) * unit for j, part in enumerate(acc))


def _batched(shape: tuple[int, ...], dtype, transforms: tuple, slots: int | None) -> plgpu.SMEM:
    if slots is None:
        return plgpu.SMEM(shape, dtype, transforms=transforms)
    batched = tuple(plgpu.batch_transform(t, 1) if hasattr(plgpu, "batch_transform") else t for t in transforms)
    return plgpu.SMEM((slots, *shape), dtype, transforms=batched)


def fields(packed: jax.Array, width: int) -> list[jax.Array]:
    """The codes in a byte of 8/width two's complement fields, lowest first, times `2^(8 - width)`: bfloat16, exact.

    A field's bits become the fraction of a number so large that their unit is its last place.
    """
    bits, found = packed.astype(jnp.int16), []
    for low in range(0, 8, width):
        last = low + width == 8  # a fraction has seven bits
        at = low - last
        exponent, top = 15 - width - at, 1 << (at + width - 1)  # counted from 0
        number = (lax.shift_right_logical(bits, jnp.int16(1)) if last else bits) & jnp.int16((2**width - 1) << at)
        number ^= jnp.int16((127 + exponent) << 7 | top)
        found.append(lax.bitcast_convert_type(number, jnp.bfloat16) - jnp.bfloat16(2**exponent + 128))
    return found


SUMS = 4
"""Of a tile: `sum w`, `sum w share`, `sum w^2`, `sum w value_scale`. Columns repeat, so that the second half of the
first two takes the same times the key's scale."""


def sums_of(w: jax.Array, scaled: jax.Array, nu, key_scale) -> list[jax.Array]:
    """Of some tokens, [C] each. `w`, `scaled`: [n, C]; `nu`: [n] uint8; `key_scale`: [n]."""
    both = jnp.where(in_first_half(w), w, times(w, key_scale))
    return [x.sum(axis=0) for x in (both, times(both, nu), w * w, scaled)]


def times(w: jax.Array, ref) -> jax.Array:
    """`w` [n, C] with each token's factor from `ref` [n]."""
    return w * over_columns(ref[...].astype(jnp.float32), w.shape[1])


def rows_of_flags(chosen: jax.Array) -> jax.Array:
    """`[H, n]` int32 -> [H, r, w], padded with 0 to whole rows of whole 16 bytes."""
    width, length = row_of_flags(chosen.shape[1])
    return jnp.pad(chosen, ((0, 0), (0, length - chosen.shape[1]))).reshape(chosen.shape[0], -1, width)


def list_by_summary(flags, summary, here: Callable, chosen: Callable, order, split: jax.Array, splits) -> jax.Array:
    """Write the tiles of a program whose number is `chosen` to `order`; returns how many. `flags`: [r, w] int32.

    Program `split` of `splits` looks at runs of LOOK tiles, `split`, `split + splits` ..., and passes over those whose
    number of `summary` is not `here`. No number is divided by `splits`, which a program may have to read.
    """

    def put(tile, count):
        return _put(order, tile, chosen(flag_of(flags, tile)), count)

    return _list(flags, summary, here, put, split, splits)


def most_listed(n: int, splits: int) -> int:
    """Tiles of `n` that a program lists at most, where as many are at work as there are tiles, or `splits`."""
    return max(splits, pl.cdiv(pl.cdiv(n, LOOK), splits) * LOOK)


def list_pieces(flags, summary, pieces: int, order, split: jax.Array, splits) -> jax.Array:
    """The same of pieces that are read from the host, numbered through all tiles of `pieces`."""

    def put(tile, count):
        bits = pieces_of(flag_of(flags, tile))

        def put_piece(piece, count):
            taken = lax.shift_right_logical(bits, piece) & 1 == 1
            return _put(order, tile * pieces + piece, taken, count)

        return lax.fori_loop(0, jnp.where(bits > 0, pieces, 0), put_piece, count)

    return _list(flags, summary, lambda n: n % TILES_READ > 0, put, split, splits)


def _put(order, item: jax.Array, taken: jax.Array, count: jax.Array) -> jax.Array:
    """Put `item` behind the `count` that are there, where it is `taken`; how many there are then."""

    @pl.when(taken)
    def _():
        order[count] = item

    return count + jnp.where(taken, jnp.int32(1), jnp.int32(0))


RUNS_AT_ONCE = 8
"""That a program passes over in one go: each by itself would wait for its number."""


def _list(flags, summary, here: Callable, put: Callable, split: jax.Array, splits) -> jax.Array:
    n = flags.shape[0] * flags.shape[1]
    runs = min(pl.cdiv(n, LOOK), summary.shape[0] * summary.shape[1])  # what is beyond either is padding

    def here_in(run):
        return here(flag_of(summary, jnp.minimum(run, runs - 1)))

    def look_at(run, count):
        tiles = jnp.where((run < runs) & here_in(run), jnp.minimum(LOOK, n - run * LOOK), jnp.int32(0))
        return lax.fori_loop(0, tiles, lambda i, count: put(run * LOOK + i, count), count)

    def look_at_some(carry):
        run, count = carry
        some = functools.reduce(jnp.logical_or, [here_in(run + i * splits) for i in range(RUNS_AT_ONCE)])
        those = jnp.where(some, RUNS_AT_ONCE, 0)
        count = lax.fori_loop(0, those, lambda i, count: look_at(run + i * splits, count), count)
        return run + RUNS_AT_ONCE * splits, count

    _, count = lax.while_loop(lambda carry: carry[0] < runs, look_at_some, (split, jnp.int32(0)))
    plgpu.commit_smem()
    return count


def flag_of(flags, tile: jax.Array) -> jax.Array:
    """A tile's number in `rows_of_flags`."""
    width = flags.shape[1]
    return flags[tile // width, tile % width]
