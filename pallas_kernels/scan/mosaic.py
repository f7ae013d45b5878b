"""First pass of a step on Mosaic GPU: every key at its coarsest level, and the windows in full.

Twin: `scan/reference.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic as mg
from pallas_kernels.levels import TILE
from pallas_kernels.mosaic import SUMS
from pallas_kernels.originals.mosaic import (
    attend_original_tile,
    load_exact_queries,
    nothing,
    store_result,
)
from pallas_kernels.query import HALF, PARTS, SHIFT, SHIFT_EXACT, UNIT, UNIT_EXACT

STAGES = 2
"""Tiles of keys on their way into shared memory."""


def scan_tiles(layer, meta, q, keys, key_scale, value_scale, nu, live, windows, *, splits: int, interpret=False):
    n_layers, heads, n, d = keys.shape
    n_tiles, columns = n // TILE, q.parts.shape[2]
    numbers_shape = plgpu.SMEM(q.numbers.shape[1:], jnp.float32)
    most = -(-n_tiles // splits)
    places = [(i, j) for i in range(len(windows) // 2) for j in range(windows[2 * i].shape[2] // TILE)]

    def kernel(layer_ref, meta_ref, q_ref, wide_ref, numbers_ref, k_ref, ks_ref, vs_ref, nu_ref, live_ref, *refs):
        window_refs, (stats_ref, weights_ref, acc_ref, sums_ref) = refs[: len(windows)], refs[len(windows) :]
        h, split = lax.axis_index("h"), lax.axis_index("s")
        layer, first, end = layer_ref[0], meta_ref[h, 0], meta_ref[h, 1]

        def stream(numbers, stats, weights, barrier, *queries):
            plgpu.copy_gmem_to_smem(numbers_ref.at[h], numbers, barrier)
            for i, q in enumerate(queries):
                plgpu.copy_gmem_to_smem(q_ref.at[h, i], q, barrier)
            per = (end - first + splits - 1) // splits
            start = first + split * per
            steps = jnp.maximum(jnp.minimum(per, end - start), 0)
            plgpu.barrier_wait(barrier)
            unit, half, shift = (mg.over_rows(numbers[i], TILE) for i in (UNIT, HALF, SHIFT))

            def visit(index, k, ks, vs, nu):
                w = jnp.exp2(mg.times(mg.integer_dot(k, queries) * unit + half, ks) + shift)
                scaled = mg.times(w, vs)
                tile, slot = start + index[0], index[0] % 2
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the slot's last copies have left it
                mg.store_sums(w, scaled, nu, ks, stats.at[slot])
                mg.store_weights(scaled, weights.at[slot])
                plgpu.commit_smem()  # after the last read of the tile: the pipeline refills it without a barrier
                plgpu.copy_smem_to_gmem(stats.at[slot], stats_ref.at[h, tile], commit_group=False)
                plgpu.copy_smem_to_gmem(weights.at[slot], weights_ref.at[h, tile])

            here = pl.ds(start * TILE, most * TILE)
            a_number = plgpu.BlockSpec((TILE,), lambda i: (i,))
            plgpu.emit_pipeline(
                visit,
                grid=(steps,),
                max_concurrent_steps=STAGES,
                in_specs=[
                    plgpu.BlockSpec((TILE, d), lambda i: (i, 0), transforms=mg.swizzled(8, d)),
                    *[a_number] * 3,
                ],
            )(*(ref.at[layer, h, here] for ref in (k_ref, ks_ref, vs_ref, nu_ref)))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(split < splits)
        def _():
            pl.run_scoped(
                stream,
                numbers_shape,
                plgpu.SMEM((2, SUMS, columns), jnp.float32),
                mg.weights_ref(columns, 2),
                plgpu.Barrier(num_arrivals=1 + PARTS),
                *[mg.tile_ref((columns, d), jnp.int8)] * PARTS,
            )

        def window(place, index):
            def attend(numbers, out, sums, barrier, values_barrier, tile, weights, *queries):
                which, i = place
                k, v = (ref.at[layer, h, pl.ds(i * TILE, TILE)] for ref in window_refs[2 * which : 2 * which + 2])
                plgpu.copy_gmem_to_smem(k, tile, barrier)
                load_exact_queries(h, wide_ref, numbers_ref, queries, numbers, barrier)
                plgpu.barrier_wait(barrier)
                unit, shift = (mg.over_rows(numbers[i], TILE) for i in (UNIT_EXACT, SHIFT_EXACT))

                def values_ready():
                    plgpu.copy_gmem_to_smem(v, tile, values_barrier)
                    plgpu.barrier_wait(values_barrier)

                carry = attend_original_tile(
                    live_ref[h, index], queries, unit, shift, tile, tile, weights, nothing(d, columns), interpret,
                    values_ready,
                )  # fmt: skip
                store_result(carry, out, sums, acc_ref.at[h, index], sums_ref.at[h, index])
                plgpu.wait_smem_to_gmem(0)

            pl.run_scoped(
                attend,
                numbers_shape,
                plgpu.SMEM((d, columns), jnp.float32),
                plgpu.SMEM((4, columns), jnp.float32),
                plgpu.Barrier(num_arrivals=2 + PARTS),
                plgpu.Barrier(num_arrivals=1),
                mg.tile_ref((TILE, d), jnp.bfloat16),
                mg.weights_ref(columns),
                *[mg.tile_ref((columns, d), jnp.bfloat16)] * PARTS,
            )

        for index, place in enumerate(places):
            pl.when(split == splits + index)(lambda place=place, index=index: window(place, index))

    f32 = jnp.float32
    run = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((heads, n_tiles, SUMS, columns), f32),
            jax.ShapeDtypeStruct((heads, n_tiles, columns, TILE), jnp.bfloat16),
            jax.ShapeDtypeStruct((heads, len(places), d, columns), f32),
            jax.ShapeDtypeStruct((heads, len(places), 4, columns), f32),
        ],
        grid=(heads, splits + len(places)),
        grid_names=("h", "s"),
        kernel_name="scan_tiles",
        compiler_params=mg.PARAMS,
        interpret=interpret,
    )
    return run(layer, meta, q.parts, q.wide, q.numbers, keys, key_scale, value_scale, nu, live, *windows)
