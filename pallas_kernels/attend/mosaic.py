"""Second pass of a step on Mosaic GPU: the values of chosen tiles at their coarsest, both planes of keys and values of
those at the finest level, and originals of those that are promoted, from the host.

Twin: `attend/tiles.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic as mg
from pallas_kernels.attend.tiles import COARSE, FINEST, PROMOTED
from pallas_kernels.mosaic import SUMS, TILE
from pallas_kernels.originals.mosaic import attend_chosen_originals, scratch_of_originals
from pallas_kernels.query import HALF_FINE, LOW_UNIT, PARTS, SHIFT, UNIT, together

AHEAD = 3
"""Tiles of coarse values on their way into shared memory."""

ROWS = 64
"""Channels that are multiplied at once."""

READERS = 32
"""Programs of a head that read from the host, where there is something to read, so that few tiles share one. They come
first: while they wait for the bus the others are at work."""

N_FINEST, N_PROMOTED = 2, 3
"""Columns of `counts`."""


def attend_tiles(layer, meta, levels, counts, weights, q, keys, keys_low, key_scale, values, values_low, value_scale,
                 nu, host_keys, host_values, *, splits: int, interpret=False):  # fmt: skip
    n_layers, heads, n, d = keys.shape
    n_tiles, columns, half_d = n // TILE, q.parts.shape[2], d // 2
    levels = mg.rows_of_flags(levels)
    f32, rows = jnp.float32, levels.shape[1:]
    host = () if host_keys is None else (host_keys, host_values)
    readers = READERS if host else 0

    def kernel(layer_ref, meta_ref, levels_ref, counts_ref, w_ref, q_ref, wide_ref, numbers_ref, *refs):
        (k_ref, low_ref, ks_ref, v_ref, v_low_ref, vs_ref, nu_ref), refs = refs[:7], refs[7:]
        host_refs, (acc_ref, stats_ref, *found_refs) = refs[: len(host)], refs[len(host) :]
        h, program = lax.axis_index("h"), lax.axis_index("s")
        layer, split = layer_ref[0], program - readers

        def attend(flags, order, out, barrier, ready, v, w, *scratch):
            plgpu.copy_gmem_to_smem(levels_ref.at[h], flags, barrier)
            plgpu.barrier_wait(barrier)
            count = mg.list_chosen(flags, COARSE, order, split, splits)

            def fetch(i):
                @pl.when(i < count)
                def _():
                    slot, tile = i % AHEAD, order[i]
                    plgpu.copy_gmem_to_smem(v_ref.at[layer, h, tile], v.at[slot], ready.at[slot])
                    plgpu.copy_gmem_to_smem(w_ref.at[h, tile], w.at[slot], ready.at[slot])

            for i in range(AHEAD):
                fetch(jnp.int32(i))

            def visit(i, acc):
                slot = i % AHEAD
                plgpu.barrier_wait(ready.at[slot])

                def product(j):
                    codes = mg.fields(v[slot, pl.ds(j * ROWS, ROWS)], 4)
                    return mg.sum_products(ROWS, mg.weighted(codes, w.at[slot]), interpret)

                acc = tuple(part + product(j) for j, part in enumerate(acc))
                plgpu.commit_smem()  # a barrier: no warp is at the tile any more
                fetch(i + AHEAD)
                return acc

            acc = lax.fori_loop(0, count, visit, (jnp.zeros((ROWS, columns), f32),) * (d // ROWS))
            for j, part in enumerate(acc):
                out[pl.ds(j * ROWS, ROWS)] = part * 0.25  # codes came in units of 16; a value has 4

            @pl.when(counts_ref[h, N_FINEST] > 0)
            def _():
                refine(flags, order, out, v, w, *scratch)

            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, acc_ref.at[h, split])
            plgpu.wait_smem_to_gmem(0)

        def refine(flags, order, out, v, w, numbers, stats, queries_ready, fine_ready, k, k_low, ks, v_low, vs, share,
                   *scratch):  # fmt: skip
            queries, halves = scratch[:PARTS], scratch[PARTS:]
            loads = (
                (numbers_ref.at[h], numbers),
                *((q_ref.at[h, i], q) for i, q in enumerate(queries)),
                # Each part cut in the middle of its channels, as the fields of a key's lower plane are.
                *((wide_ref.at[h, i // 2, :, pl.ds(i % 2 * half_d, half_d)], q) for i, q in enumerate(halves)),
            )  # fmt: skip
            for source, target in loads:
                plgpu.copy_gmem_to_smem(source, target, queries_ready)
            plgpu.barrier_wait(queries_ready)
            count = mg.list_chosen(flags, FINEST, order, split, splits)
            unit, low_unit, half, shift = (mg.over_rows(numbers[i], TILE) for i in (UNIT, LOW_UNIT, HALF_FINE, SHIFT))

            def visit(i, carry):
                acc, acc_low = carry
                tile = order[i]
                here = pl.ds(tile * TILE, TILE)
                sources = (
                    (k_ref.at[layer, h, here], k), (low_ref.at[layer, h, here], k_low), (ks_ref.at[layer, h, here], ks),
                    (v_ref.at[layer, h, tile], v.at[0]), (v_low_ref.at[layer, h, tile], v_low),
                    (vs_ref.at[layer, h, here], vs), (nu_ref.at[layer, h, here], share),
                )  # fmt: skip
                for source, target in sources:
                    plgpu.copy_gmem_to_smem(source, target, fine_ready)
                plgpu.barrier_wait(fine_ready)
                x = mg.integer_dot(k, queries) * unit
                fields = mg.fields(k_low[...], 4)
                low = [
                    mg.sum_products(
                        TILE,
                        [(f, q.transpose((1, 0))) for f, q in zip(fields, halves[2 * j : 2 * j + 2], strict=True)],
                        interpret,
                    )
                    for j in range(PARTS)
                ]
                p = jnp.exp2(mg.times(x + together(low) * low_unit + half, ks) + shift)
                scaled = mg.times(p, vs)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                mg.store_sums(p, scaled, share, ks, stats)
                mg.store_weights(scaled, w.at[0])
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(stats, stats_ref.at[h, tile])
                acc = acc + mg.sum_products(d, mg.weighted(mg.fields(v[0], 4), w.at[0]), interpret)
                acc_low = acc_low + mg.sum_products(d, mg.weighted(mg.fields(v_low[...], 2), w.at[0]), interpret)
                plgpu.commit_smem()  # a barrier: no warp is at the tile any more
                return acc, acc_low

            zero = jnp.zeros((d, columns), f32)
            acc, acc_low = lax.fori_loop(0, count, visit, (zero, zero))
            # Codes came in units of 16 and 64; a value has 4 and 1.
            out[...] = out[...] + acc * 0.25 + acc_low * (1 / 64)

        @pl.when(program >= readers)
        def _():
            pl.run_scoped(
                attend,
                plgpu.SMEM(rows, jnp.int32),
                plgpu.SMEM((-(-rows[0] * rows[1] // splits),), jnp.int32),
                plgpu.SMEM((d, columns), f32),
                plgpu.Barrier(num_arrivals=1),
                plgpu.Barrier(num_arrivals=2, num_barriers=AHEAD),
                mg.tile_ref((d, TILE // 2), jnp.int8, AHEAD),
                mg.weights_ref(columns, AHEAD),
                plgpu.SMEM(q.numbers.shape[1:], f32),
                plgpu.SMEM((SUMS, columns), f32),
                plgpu.Barrier(num_arrivals=1 + 3 * PARTS),
                plgpu.Barrier(num_arrivals=7),
                mg.tile_ref((TILE, d), jnp.int8),
                mg.tile_ref((TILE, half_d), jnp.int8),
                plgpu.SMEM((TILE,), jnp.bfloat16),
                mg.tile_ref((d, TILE // 4), jnp.int8),
                plgpu.SMEM((TILE,), jnp.bfloat16),
                plgpu.SMEM((TILE,), jnp.uint8),
                *[mg.tile_ref((columns, d), jnp.int8)] * PARTS,
                *[mg.tile_ref((columns, half_d), jnp.bfloat16)] * (2 * PARTS),
            )

        if readers:

            @pl.when((program < readers) & (counts_ref[h, N_PROMOTED] > 0))
            def _():
                read = attend_chosen_originals(
                    h, program, layer, meta_ref[h, 2], levels_ref, PROMOTED, wide_ref, numbers_ref, host_refs,
                    found_refs, readers, alone=False, interpret=interpret,
                )  # fmt: skip
                pl.run_scoped(read, *scratch_of_originals(rows, readers, q))

    run = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((heads, splits, d, columns), f32),
            jax.ShapeDtypeStruct((heads, n_tiles, SUMS, columns), f32),
            *([jax.ShapeDtypeStruct((heads, readers, x, columns), f32) for x in (d, 4)] if readers else []),
        ],
        grid=(heads, readers + splits),
        grid_names=("h", "s"),
        kernel_name="attend_tiles",
        compiler_params=mg.PARAMS,
        interpret=interpret,
    )
    return run(
        layer, meta, levels, counts, weights, q.parts, q.wide, q.numbers, keys, keys_low, key_scale, values, values_low,
        value_scale, nu, *host,
    )  # fmt: skip
