"""Chosen tiles on Mosaic GPU with both planes of keys and values, and originals of promoted pieces, from the host.

Twin: `fine/reference.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic as mg
from pallas_kernels.levels import (
    FINEST,
    N_FINEST,
    N_PROMOTED,
    TILE,
    TILES_READ,
    at_work,
    level_of_rest,
    pieces_of,
    tokens_of_a_piece,
)
from pallas_kernels.mosaic import SUMS
from pallas_kernels.originals.mosaic import ROWS, attend_promoted_pieces, scratch_of_pieces
from pallas_kernels.query import HALF_FINE, LOW_UNIT, NUMBERS, PARTS, SHIFT, UNIT, together


def _refine(h, split, layer, words_ref, summary_ref, q_refs, tier1_refs, acc_ref, stats_ref, splits, interpret):
    """What program `split` of `splits` does for a head: attend to the tiles of its share that are read at their finest.
    """
    (q_ref, wide_ref, numbers_ref), (k_ref, low_ref, ks_ref, v_ref, v_low_ref, vs_ref, nu_ref) = q_refs, tier1_refs
    columns, d = q_ref.shape[2:]
    half_d, f32 = d // 2, jnp.float32

    def refine(flags, summary, order, out, numbers, stats, queries_ready, ready, k, k_low, ks, v, v_low, vs, share,
               w, queries, halves):  # fmt: skip
        loads = (
            (words_ref.at[h], flags),
            (summary_ref.at[h], summary),
            (numbers_ref.at[h], numbers),
            (q_ref.at[h], queries),
            # Each part cut in the middle of its channels, as the fields of a key's lower plane are.
            *((wide_ref.at[h, i // 2, :, pl.ds(i % 2 * half_d, half_d)], halves.at[i]) for i in range(2 * PARTS)),
        )  # fmt: skip
        for source, target in loads:
            plgpu.copy_gmem_to_smem(source, target, queries_ready)
        plgpu.barrier_wait(queries_ready)
        count = mg.list_by_summary(
            flags, summary, lambda n: n >= TILES_READ, lambda word: level_of_rest(word, d) == FINEST, order, split,
            splits,
        )  # fmt: skip

        def attend_keys(i, found, pieces, zero):
            """With the sums of ROWS tokens, whose weights are stored."""
            start = pl.multiple_of(i * ROWS, ROWS)
            here = pl.ds(start, ROWS)
            fields = mg.fields(k_low[here], 4)
            low = [
                mg.sum_products(
                    ROWS,
                    [(f, halves.at[zero + 2 * j + i].transpose((1, 0))) for i, f in enumerate(fields)],
                    interpret,
                )
                for j in range(PARTS)
            ]
            unit, low_unit, half, shift = (mg.over_rows(numbers[i], ROWS) for i in (UNIT, LOW_UNIT, HALF_FINE, SHIFT))
            high = mg.integer_dot(k.at[here], mg.parts_of(queries, zero))
            x = high * unit + together(low) * low_unit + half
            p = jnp.exp2(mg.times(x, ks.at[here]) + shift)
            token = lax.broadcasted_iota(jnp.int32, (ROWS, columns), 0)
            piece = (token + start) // tokens_of_a_piece(d)
            elsewhere = lax.shift_right_logical(jnp.full_like(piece, pieces), piece) % 2 == 1
            p = jnp.where(elsewhere, jnp.zeros_like(p), p)  # read from the host
            scaled = mg.times(p, vs.at[here])
            mg.store_weights(scaled, w.at[zero, :, here])
            return tuple(x + y for x, y in zip(found, mg.sums_of(p, scaled, share.at[here], ks.at[here]), strict=True))

        def add_values(j, zero):
            """Of ROWS channels."""
            rows = pl.ds(pl.multiple_of(j * ROWS, ROWS), ROWS)
            high, low = (
                mg.sum_products(ROWS, mg.weighted(mg.fields(plane[rows], width), w.at[zero]), interpret) * unit
                for plane, (width, unit) in ((v, mg.HIGH), (v_low, mg.LOW))
            )
            out[rows] = out[rows] + (high + low)
            return zero

        def visit(i, _):
            tile = order[i]
            here = pl.ds(tile * TILE, TILE)
            sources = (
                (k_ref.at[layer, h, here], k), (low_ref.at[layer, h, here], k_low), (ks_ref.at[layer, h, here], ks),
                (v_ref.at[layer, h, tile], v), (v_low_ref.at[layer, h, tile], v_low), (vs_ref.at[layer, h, here], vs),
                (nu_ref.at[layer, h, here], share),
            )  # fmt: skip
            for source, target in sources:
                plgpu.copy_gmem_to_smem(source, target, ready)
            pieces, zero = pieces_of(mg.flag_of(flags, tile)), mg.zero_of(tile)
            plgpu.barrier_wait(ready)
            nothing = (jnp.zeros((columns,), f32),) * SUMS
            found = lax.fori_loop(0, TILE // ROWS, lambda i, found: attend_keys(i, found, pieces, zero), nothing)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for i, x in enumerate(found):
                stats[i] = x
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(stats, stats_ref.at[h, tile])
            lax.fori_loop(0, d // ROWS, add_values, zero)
            plgpu.commit_smem()  # a barrier: no warp is at the tile any more

        for j in range(d // ROWS):
            out[pl.ds(j * ROWS, ROWS)] = jnp.zeros((ROWS, columns), f32)
        lax.fori_loop(0, count, visit, None)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out, acc_ref.at[h, split])
        plgpu.wait_smem_to_gmem(0)

    return refine


def _scratch(rows: tuple[int, int], chunks: tuple[int, int], splits: int, columns: int, d: int) -> list:
    return [
        plgpu.SMEM(rows, jnp.int32),
        plgpu.SMEM(chunks, jnp.int32),
        plgpu.SMEM((mg.most_listed(rows[0] * rows[1], splits),), jnp.int32),
        plgpu.SMEM((d, columns), jnp.float32),
        plgpu.SMEM((NUMBERS, columns), jnp.float32),
        plgpu.SMEM((SUMS, columns), jnp.float32),
        plgpu.Barrier(num_arrivals=4 + 2 * PARTS),
        plgpu.Barrier(num_arrivals=7),
        mg.tile_ref((TILE, d), jnp.int8),
        mg.tile_ref((TILE, d // 2), jnp.int8),
        plgpu.SMEM((TILE,), jnp.bfloat16),
        mg.tile_ref((d, TILE // 2), jnp.int8),
        mg.tile_ref((d, TILE // 4), jnp.int8),
        plgpu.SMEM((TILE,), jnp.bfloat16),
        plgpu.SMEM((TILE,), jnp.uint8),
        mg.weights_ref(columns, 1),
        mg.tile_ref((columns, d), jnp.int8, PARTS),
        mg.tile_ref((columns, d // 2), jnp.bfloat16, 2 * PARTS),
    ]


class Listed(NamedTuple):
    """Of a head, how many tiles are refined, and how many programs that refine and that read from the host are at work;
    the rest stores nothing."""

    tiles: jax.Array
    refining: jax.Array
    reading: jax.Array


def listed(counts_ref, h, refiners: int, readers: int) -> Listed:
    """Of as many tiles as there are only so many programs are at work (`levels.at_work`)."""
    n_promoted = counts_ref[h, N_PROMOTED]
    tiles = counts_ref[h, N_FINEST] + n_promoted
    return Listed(tiles, at_work(tiles, refiners), at_work(n_promoted, readers))


def results(heads: int, n: int, d: int, columns: int, refiners: int, readers: int) -> list[jax.ShapeDtypeStruct]:
    """What programs leave that refine; and, where there are any, those that read from the host."""
    shapes = [(heads, refiners, d, columns), (heads, n // TILE, SUMS, columns)]
    if readers:
        shapes += [(heads, readers, d, columns), (heads, readers, 4, columns)]
    return [jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes]


def attend_listed(
    h, layer, some: Listed, refiner, reader, refiners: int, readers: int, flags_refs, q_refs, tier1_refs, host_refs,
    found_refs, interpret, *, programs: int,
) -> None:
    """What a program does that is number `refiner` of those that refine, and `reader` of those that read from the host,
    one after the other, where it is at work as either. A negative number is none. Of fewer `programs` than `readers`
    each is several readers: with fewer of these a list of pieces would take more shared memory."""
    acc_ref, stats_ref, *host_found = found_refs
    rows, chunks = (ref.shape[1:] for ref in flags_refs)
    columns, d = q_refs[0].shape[2:]

    def as_reader(number):
        @pl.when((number >= 0) & (number < some.reading))
        def _():
            read = attend_promoted_pieces(
                h, number, layer, *flags_refs, *q_refs[1:], host_refs, host_found, some.reading, interpret=interpret
            )
            pl.run_scoped(read, *scratch_of_pieces(rows, chunks, readers, columns, d))

    refines, reads = (refiner >= 0) & (refiner < some.refining), (reader >= 0) & (reader < some.reading)

    @pl.when(refines | reads)  # one way around all of it: every further branch would end in code that is in no cache
    def _():
        @pl.when(refines)
        def _():
            refine = _refine(
                h, refiner, layer, *flags_refs, q_refs, tier1_refs, acc_ref, stats_ref, some.refining, interpret
            )
            pl.run_scoped(refine, *_scratch(rows, chunks, refiners, columns, d))

        if readers > programs:
            lax.fori_loop(0, pl.cdiv(readers, programs), lambda i, _: as_reader(reader + i * programs), None)
        elif readers:
            as_reader(reader)


def attend_fine(layer, words, counts, summary, q, keys, keys_low, key_scale, values, values_low, value_scale, nu,
                host_keys, host_values, *, splits: int, readers: int, interpret=False):  # fmt: skip
    """Programs 0 to `readers` of a head read from the host; the others are at work while they wait for the bus."""
    heads, n, d = keys.shape[1:]
    words, summary = mg.rows_of_flags(words), mg.rows_of_flags(summary)
    host = () if host_keys is None else (host_keys, host_values)
    readers = readers if host else 0

    def kernel(layer_ref, words_ref, counts_ref, summary_ref, *refs):
        q_refs, tier1_refs, host_refs = refs[:3], refs[3:10], refs[10 : 10 + len(host)]
        h, program = lax.axis_index("h"), lax.axis_index("s")
        attend_listed(
            h, layer_ref[0], listed(counts_ref, h, splits, readers), program - readers, program, splits, readers,
            (words_ref, summary_ref), q_refs, tier1_refs, host_refs, refs[10 + len(host) :], interpret,
            programs=readers + splits,
        )  # fmt: skip

    run = plgpu.kernel(
        kernel,
        out_type=results(heads, n, d, q.parts.shape[2], splits, readers),
        grid=(readers + splits, heads),  # all heads' first programs before any second: those at work start first
        grid_names=("s", "h"),
        kernel_name="attend_fine",
        compiler_params=mg.PARAMS,
        interpret=interpret,
    )
    return run(
        layer, words, counts, summary, q.parts, q.wide, q.numbers, keys, keys_low, key_scale, values, values_low,
        value_scale, nu, *host,
    )  # fmt: skip
