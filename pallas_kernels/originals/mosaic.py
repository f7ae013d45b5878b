"""Attention over original keys and values on Mosaic GPU: windows on the device, pieces of tier 2 from host memory.

Twin: `originals/reference.py`. All of a head's originals: `originals/triton.py`.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic as mg
from pallas_kernels.levels import TILE, pieces_of_a_tile, tokens_of_a_piece
from pallas_kernels.query import NUMBERS, PARTS, SHIFT_EXACT, UNIT_EXACT, together

ROWS = 64
"""Tokens, or channels, that are looked at at once: what a whole tile takes of registers would leave room for fewer
programs."""

HALF = TILE // 2
"""Tokens that are read from the host at once."""

LOWEST = -1e30
"""Score of what is not attended to."""


def load_from_host(sources, targets) -> None:
    """Some tokens of each, `[n, d]` bfloat16, of memory that the copy engine does not reach, by the threads themselves:
    all are on their way before the first arrives."""
    n, d = sources[0].shape
    copied = plgpu.Layout.SMEM_GMEM_COPY((n, d), jnp.bfloat16, plgpu.find_swizzle(16 * d))
    tiles = [plgpu.load(source, layout=copied, optimized=False) for source in sources]
    for tile, target in zip(tiles, targets, strict=True):
        target[...] = tile
    plgpu.commit_smem()


def attend_original_tile(
    live, queries, unit, shift, keys, values, weights, carry, interpret, values_ready=lambda: None
):
    """Some tokens of originals in shared memory, [n, d] bfloat16 each, of which the first `live` count. Values may
    share the memory of the keys; `values_ready` then puts them there once the keys have been read."""
    acc, total, k_max, v_max, peak = carry  # the squares of the longest key and value; the largest score
    n, columns = unit.shape

    def largest(ref):
        def visit(i, found):
            x = ref[pl.ds(i * ROWS, ROWS)].astype(jnp.float32)
            return jnp.maximum(found, mg.over_columns((x * x).sum(axis=1), columns).max(axis=0))

        return lax.fori_loop(0, n // ROWS, visit, jnp.zeros((columns,), jnp.float32))

    k_max = jnp.maximum(k_max, largest(keys))
    x = together([mg.sum_products(n, [(keys, q.transpose((1, 0)))], interpret) for q in queries]) * unit + shift
    seen = lax.broadcasted_iota(jnp.int32, (n, columns), 0) < live
    x = jnp.where(seen, x, jnp.full((n, columns), LOWEST, jnp.float32))
    higher = jnp.maximum(peak, x.max(axis=0))
    shrink = jnp.exp2(peak - higher)
    p = jnp.exp2(x - mg.over_rows(higher, n))
    p = jnp.where(seen, p, jnp.zeros((n, columns), jnp.float32))
    mg.store_weights(p, weights)
    plgpu.commit_smem()
    values_ready()

    def product(j):
        channels = values.transpose((1, 0))[pl.ds(j * ROWS, ROWS)]
        return mg.sum_products(ROWS, [(channels, weights.transpose((1, 0)))], interpret)

    acc = tuple(part * mg.over_rows(shrink, ROWS) + product(j) for j, part in enumerate(acc))
    total = total * shrink + p.sum(axis=0)
    return acc, total, k_max, jnp.maximum(v_max, largest(values)), higher


def load_exact_queries(h, q_ref, numbers_ref, queries, numbers, barrier) -> None:
    """Start `PARTS + 1` copies: the parts of the queries as they are, and the numbers."""
    for i, q in enumerate(mg.parts_of(queries)):
        plgpu.copy_gmem_to_smem(q_ref.at[h, PARTS + i], q, barrier)
    plgpu.copy_gmem_to_smem(numbers_ref.at[h], numbers, barrier)


def nothing(d: int, columns: int):
    zero = jnp.zeros((columns,), jnp.float32)
    acc = (jnp.zeros((ROWS, columns), jnp.float32),) * (d // ROWS)
    return acc, zero, zero, zero, jnp.full((columns,), LOWEST, jnp.float32)


def store_result(carry, out, sums, out_ref, sums_ref) -> None:
    acc, *rest = carry
    store_parts(acc, out, out_ref)
    store_rows(rest, sums, sums_ref)


def store_parts(parts, out, ref) -> None:
    """`ROWS` rows each, by way of `out` in shared memory."""
    for j, part in enumerate(parts):
        out[pl.ds(j * ROWS, ROWS)] = part
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out, ref)


def store_rows(rows, sums, ref) -> None:
    for i, row in enumerate(rows):
        sums[i] = row
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(sums, ref)


def attend_promoted_pieces(
    h, part, layer, words_ref, summary_ref, q_ref, numbers_ref, host_refs, found_refs, parts, *, interpret
):
    """What program `part` of `parts` does for a head: attend to the promoted pieces of every tile of its share, as many
    at once as HALF has room for. A program that finds none says so by a total of 0, and by nothing else."""
    k_ref, v_ref = host_refs
    acc_ref, sums_ref = found_refs

    def attend(flags, numbers, order, out, sums, barrier, *rest):
        queries, keys, values, weights, summary = rest
        d, columns = out.shape
        size = tokens_of_a_piece(d)
        plgpu.copy_gmem_to_smem(words_ref.at[h], flags, barrier)
        plgpu.copy_gmem_to_smem(summary_ref.at[h], summary, barrier)
        load_exact_queries(h, q_ref, numbers_ref, queries, numbers, barrier)
        plgpu.barrier_wait(barrier)
        count = mg.list_pieces(flags, summary, pieces_of_a_tile(d), order, part, parts)
        for tile in (keys, values):  # a product takes HALF rows, of which fewer may be read
            tile[...] = jnp.zeros((HALF, d), jnp.bfloat16)

        def load(first, places):
            sources, targets = [], []
            for i in places:
                here, there = pl.ds(order[first + i] * size, size), pl.ds(i * size, size)
                sources += [ref.at[layer, h, here] for ref in (k_ref, v_ref)]
                targets += [ref.at[there] for ref in (keys, values)]
            load_from_host(sources, targets)

        many = HALF // size

        def read(i, carry):
            first = i * many
            here = jnp.minimum(count - first, many)
            plgpu.commit_smem()  # a barrier: no warp reads the pieces before any more
            # All at once, or one after the other: as much code as that, and no more, stands here twice, since most
            # programs go once through code that is in no cache.
            pl.when(here == many)(lambda: load(first, range(many)))
            for place in range(many - 1):
                pl.when((here < many) & (place < here))(lambda place=place: load(first, [place]))
            unit, shift = (mg.over_rows(numbers[i], HALF) for i in (UNIT_EXACT, SHIFT_EXACT))
            those = mg.parts_of(queries, mg.zero_of(order[first]))
            return attend_original_tile(here * size, those, unit, shift, keys, values, weights, carry, interpret)

        acc, *rest = lax.fori_loop(0, (count + many - 1) // many, read, nothing(d, columns))
        store_rows(rest, sums, sums_ref.at[h, part])

        @pl.when(count > 0)
        def _():
            store_parts(acc, out, acc_ref.at[h, part])

        plgpu.wait_smem_to_gmem(0)

    return attend


def scratch_of_pieces(rows: tuple[int, int], summary: tuple[int, int], parts: int, columns: int, d: int) -> list:
    """Shared memory for what `attend_promoted_pieces` returns. `rows`: of the flags."""
    return [
        plgpu.SMEM(rows, jnp.int32),
        plgpu.SMEM((NUMBERS, columns), jnp.float32),
        plgpu.SMEM((mg.most_listed(rows[0] * rows[1], parts) * pieces_of_a_tile(d),), jnp.int32),
        plgpu.SMEM((d, columns), jnp.float32),
        plgpu.SMEM((4, columns), jnp.float32),
        plgpu.Barrier(num_arrivals=3 + PARTS),
        mg.tile_ref((columns, d), jnp.bfloat16, PARTS),
        *[mg.tile_ref((HALF, d), jnp.bfloat16)] * 2,
        mg.weights_ref(columns, tokens=HALF),
        plgpu.SMEM(summary, jnp.int32),
    ]
