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
from pallas_kernels.mosaic import COLUMNS, TILE
from pallas_kernels.originals.mosaic import attend_original_tile, nothing, scratch_of_a_tile, store_result

STAGES = 4
"""Tiles of keys on their way into shared memory."""


def scan_tiles(meta, q_high, q_low, coefficients, keys, scale, nu, live, q_pair, window_coefficients, windows, *,
               splits: int, interpret=False):  # fmt: skip
    n_layers, heads, n, d = keys.shape
    n_tiles = n // TILE
    most = -(-n_tiles // splits)
    places = [(i, j) for i in range(len(windows) // 2) for j in range(windows[2 * i].shape[2] // TILE)]

    def kernel(meta_ref, qh_ref, ql_ref, co_ref, k_ref, s_ref, nu_ref, live_ref, qp_ref, wco_ref, *refs):
        window_refs, (stats_ref, acc_ref, sums_ref) = refs[: len(windows)], refs[len(windows) :]
        h, split = lax.axis_index("h"), lax.axis_index("s")
        layer, first, end = meta_ref[h, 0], meta_ref[h, 1], meta_ref[h, 2]

        def stream(qh, ql, co, stats, barrier):
            for source, target in ((qh_ref, qh), (ql_ref, ql), (co_ref, co)):
                plgpu.copy_gmem_to_smem(source.at[h], target, barrier)
            per = (end - first + splits - 1) // splits
            start = first + split * per
            steps = jnp.maximum(jnp.minimum(per, end - start), 0)
            plgpu.barrier_wait(barrier)
            unit, half, shift = (mg.over_rows(co[i], TILE) for i in range(3))

            def visit(index, k, s, nu):
                x = mg.integer_dot(k, qh, ql) * unit + half
                w = jnp.exp2(x * mg.over_columns(s[...].astype(jnp.float32)) + shift)
                slot = index[0] % 2
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the slot's last copy has left it
                mg.store_sums(w, nu, stats.at[slot])
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(stats.at[slot], stats_ref.at[h, start + index[0]])

            here = pl.ds(start * TILE, most * TILE)
            plgpu.emit_pipeline(
                visit,
                grid=(steps,),
                max_concurrent_steps=STAGES,
                in_specs=[
                    plgpu.BlockSpec((TILE, d), lambda i: (i, 0), transforms=mg.swizzled(8, d)),
                    plgpu.BlockSpec((TILE,), lambda i: (i,)),
                    plgpu.BlockSpec((TILE,), lambda i: (i,)),
                ],
            )(k_ref.at[layer, h, here], s_ref.at[layer, h, here], nu_ref.at[layer, h, here])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(split < splits)
        def _():
            pl.run_scoped(
                stream,
                mg.tile_ref((COLUMNS, d), jnp.int8),
                mg.tile_ref((COLUMNS, d), jnp.int8),
                plgpu.SMEM((3, COLUMNS), jnp.float32),
                plgpu.SMEM((2, 3, COLUMNS), jnp.float32),
                plgpu.Barrier(num_arrivals=3),
            )

        def window(place, index):
            def attend(queries_high, queries_low, co, out, sums, barrier, *buffers):
                loads = ((qp_ref.at[h, 0], queries_high), (qp_ref.at[h, 1], queries_low), (wco_ref.at[h], co))
                for source, target in loads:
                    plgpu.copy_gmem_to_smem(source, target, barrier)
                plgpu.barrier_wait(barrier)
                unit, shift = (mg.over_rows(co[i], TILE) for i in range(2))
                which, tile = place
                k, v = (ref.at[layer, h, pl.ds(tile * TILE, TILE)] for ref in window_refs[2 * which : 2 * which + 2])
                carry = attend_original_tile(
                    k, v, live_ref[h, index], (queries_high, queries_low), unit, shift, buffers, nothing(d)
                )
                store_result(carry, out, sums, acc_ref.at[h, index], sums_ref.at[h, index])
                plgpu.wait_smem_to_gmem(0)

            pl.run_scoped(
                attend,
                *[mg.tile_ref((COLUMNS, d), jnp.bfloat16)] * 2,
                plgpu.SMEM((2, COLUMNS), jnp.float32),
                plgpu.SMEM((d, COLUMNS), jnp.float32),
                plgpu.SMEM((4, COLUMNS), jnp.float32),
                plgpu.Barrier(num_arrivals=3),
                *scratch_of_a_tile(d),
            )

        for index, place in enumerate(places):
            pl.when(split == splits + index)(lambda place=place, index=index: window(place, index))

    f32 = jnp.float32
    run = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((heads, n_tiles, 3, COLUMNS), f32),
            jax.ShapeDtypeStruct((heads, len(places), d, COLUMNS), f32),
            jax.ShapeDtypeStruct((heads, len(places), 4, COLUMNS), f32),
        ],
        grid=(heads, splits + len(places)),
        grid_names=("h", "s"),
        compiler_params=mg.PARAMS,
        interpret=interpret,
    )
    return run(meta, q_high, q_low, coefficients, keys, scale, nu, live, q_pair, window_coefficients, *windows)
