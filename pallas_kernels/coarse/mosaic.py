"""Second pass of a step on Mosaic GPU, first part: values of chosen tiles, with the scan's weights.

Twin: `coarse/reference.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic as mg
from pallas_kernels.levels import N_COARSE, N_VALUES, TILE, VALUES, by_scan, level_of
from pallas_kernels.originals.mosaic import ROWS, store_parts

AHEAD = 3
"""Tiles of values on their way into shared memory."""


def attend_coarse(layer, words, counts, weights, values, values_low, *, splits: int, interpret=False):
    heads, n_tiles, columns = weights.shape[:3]
    d = values.shape[3]
    words = mg.rows_of_flags(words)
    f32, rows = jnp.float32, words.shape[1:]

    def kernel(layer_ref, words_ref, counts_ref, w_ref, v_ref, v_low_ref, acc_ref):
        h, split = lax.axis_index("h"), lax.axis_index("s")
        layer = layer_ref[0]

        def attend(flags, order, out, barrier, ready, low_ready, v, v_low, w):
            plgpu.copy_gmem_to_smem(words_ref.at[h], flags, barrier)
            plgpu.barrier_wait(barrier)
            count = mg.list_chosen(flags, lambda word: by_scan(level_of(word)), order, split, splits)

            def finer(tile):
                return level_of(mg.flag_of(flags, tile)) == VALUES

            def fetch(i):
                @pl.when(i < count)
                def _():
                    slot, tile = i % AHEAD, order[i]
                    plgpu.copy_gmem_to_smem(v_ref.at[layer, h, tile], v.at[slot], ready.at[slot])
                    plgpu.copy_gmem_to_smem(w_ref.at[h, tile], w.at[slot], ready.at[slot])

                    @pl.when(finer(tile))
                    def _():
                        plgpu.copy_gmem_to_smem(v_low_ref.at[layer, h, tile], v_low.at[slot], low_ready.at[slot])

            for i in range(AHEAD):
                fetch(jnp.int32(i))

            def visit(i, acc):
                slot = i % AHEAD
                plgpu.barrier_wait(ready.at[slot])
                acc = mg.add_values(acc, v.at[slot], mg.HIGH, w.at[slot], interpret)

                def with_lower_plane(*acc):
                    plgpu.barrier_wait(low_ready.at[slot])
                    return mg.add_values(acc, v_low.at[slot], mg.LOW, w.at[slot], interpret)

                acc = lax.cond(finer(order[i]), with_lower_plane, lambda *acc: acc, *acc)
                plgpu.commit_smem()  # a barrier: no warp is at the tile any more
                fetch(i + AHEAD)
                return acc

            acc = lax.fori_loop(0, count, visit, (jnp.zeros((ROWS, columns), f32),) * (d // ROWS))
            store_parts(acc, out, acc_ref.at[h, split])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(counts_ref[h, N_COARSE] + counts_ref[h, N_VALUES] > 0)
        def _():
            pl.run_scoped(
                attend,
                plgpu.SMEM(rows, jnp.int32),
                plgpu.SMEM((-(-rows[0] * rows[1] // splits),), jnp.int32),
                plgpu.SMEM((d, columns), f32),
                plgpu.Barrier(num_arrivals=1),
                plgpu.Barrier(num_arrivals=2, num_barriers=AHEAD),
                plgpu.Barrier(num_arrivals=1, num_barriers=AHEAD),
                mg.tile_ref((d, TILE // 2), jnp.int8, AHEAD),
                mg.tile_ref((d, TILE // 4), jnp.int8, AHEAD),
                mg.weights_ref(columns, AHEAD),
            )

    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((heads, splits, d, columns), f32),
        grid=(heads, splits),
        grid_names=("h", "s"),
        kernel_name="attend_coarse",
        compiler_params=mg.PARAMS,
        interpret=interpret,
    )
    return run(layer, words, counts, weights, values, values_low)
