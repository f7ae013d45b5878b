"""Second pass of a step on Mosaic GPU: chosen tiles at their finest level, keys and values.

Twin: `attend/tiles.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic as mg
from pallas_kernels.mosaic import COLUMNS, TILE


def attend_tiles(meta, chosen, q_high, q_low, q_halves, coefficients, keys, keys_low, key_scale, values, values_low,
                 value_scale, nu, *, splits: int, interpret=False):  # fmt: skip
    n_layers, heads, n, d = keys.shape
    n_tiles = n // TILE
    half_d = d // 2

    chosen = mg.rows_of_flags(chosen)

    def kernel(meta_ref, chosen_ref, qh_ref, ql_ref, qq_ref, co_ref, *refs):
        sources, (acc_ref, stats_ref), scratch = refs[:7], refs[7:9], refs[9:]
        flags, qh, ql, q00, q01, q10, q11, co, order, stats, out, w_high, w_low, *rest = scratch
        barrier, arrived, *slots = rest
        h, split = lax.axis_index("h"), lax.axis_index("s")
        layer = meta_ref[h, 0]
        loads = (
            (chosen_ref.at[h], flags), (qh_ref.at[h], qh), (ql_ref.at[h], ql), (co_ref.at[h], co),
            (qq_ref.at[h, 0], q00), (qq_ref.at[h, 1], q01), (qq_ref.at[h, 2], q10), (qq_ref.at[h, 3], q11),
        )  # fmt: skip
        for source, target in loads:
            plgpu.copy_gmem_to_smem(source, target, barrier)
        plgpu.barrier_wait(barrier)

        count = mg.list_chosen(flags, order, split, splits)
        unit, low_unit, half, shift = (mg.over_rows(co[i], TILE) for i in range(4))

        def fetch(i):
            slot = i % 2
            tile = order[i]
            rows = pl.ds(tile * TILE, TILE)
            k, k_low, ks, v, v_low, vs, nu = sources
            where = (
                k.at[layer, h, rows], k_low.at[layer, h, rows], ks.at[layer, h, rows], v.at[layer, h, tile],
                v_low.at[layer, h, tile], vs.at[layer, h, rows], nu.at[layer, h, rows],
            )  # fmt: skip
            for source, target in zip(where, slots, strict=True):
                plgpu.copy_gmem_to_smem(source, target.at[slot], arrived.at[slot])

        @pl.when(count > 0)
        def _():
            fetch(jnp.int32(0))

        def visit(i, carry):
            acc, acc_low, off = carry
            slot = i % 2

            plgpu.barrier_wait(arrived.at[slot])
            k, k_low, ks, v, v_low, vs, nu = (ref.at[slot] for ref in slots)
            coarse = mg.integer_dot(k, qh, ql)
            first, second = mg.fields(k_low[...], 4)
            turn = (1, 0)
            high = mg.sum_products(TILE, [(first, q00.transpose(turn)), (second, q01.transpose(turn))])
            low = mg.sum_products(TILE, [(first, q10.transpose(turn)), (second, q11.transpose(turn))])
            x = coarse * unit + (high * 256 + low) * low_unit + half
            p = jnp.exp2(x * mg.over_columns(ks[...].astype(jnp.float32)) + shift)

            tile = order[i]
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # a barrier, too: no warp is at the tile before any more

            @pl.when(i + 1 < count)
            def _():
                fetch(i + 1)

            mg.store_sums(p, nu, stats.at[slot])
            w = p * mg.over_columns(vs[...].astype(jnp.float32))
            mg.store_weights(w, w_high, w_low)
            plgpu.copy_smem_to_gmem(stats.at[slot], stats_ref.at[h, tile])

            acc = mg.accumulate(acc, mg.weighted(mg.fields(v[...], 4), (w_high, w_low)))
            acc_low = mg.accumulate(acc_low, mg.weighted(mg.fields(v_low[...], 2), (w_high, w_low)))
            return acc, acc_low, off + w.sum(axis=0)

        zero = jnp.zeros((d, COLUMNS), jnp.float32)
        acc, acc_low, off = lax.fori_loop(0, count, visit, (zero, zero, jnp.zeros((COLUMNS,), jnp.float32)))
        # A value is `scale (4 high + low + 2.5)`; the codes came in units of 16 and 64.
        out[...] = acc * 0.25 + acc_low * (1 / 64) + mg.over_rows(off, d) * 2.5
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out, acc_ref.at[h, split])
        plgpu.wait_smem_to_gmem(0)

    f32 = jnp.float32
    run = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((heads, splits, d, COLUMNS), f32),
            jax.ShapeDtypeStruct((heads, n_tiles, 3, COLUMNS), f32),
        ],
        grid=(heads, splits),
        grid_names=("h", "s"),
        compiler_params=mg.PARAMS,
        scratch_types=[
            plgpu.SMEM(chosen.shape[1:], jnp.int32),
            mg.tile_ref((COLUMNS, d), jnp.int8),
            mg.tile_ref((COLUMNS, d), jnp.int8),
            *[mg.tile_ref((COLUMNS, half_d), jnp.bfloat16)] * 4,
            plgpu.SMEM((4, COLUMNS), f32),
            plgpu.SMEM((-(-chosen.shape[1] * chosen.shape[2] // splits),), jnp.int32),
            plgpu.SMEM((2, 3, COLUMNS), f32),
            plgpu.SMEM((d, COLUMNS), f32),
            mg.weights_ref(),
            mg.weights_ref(),
            plgpu.Barrier(num_arrivals=8),
            plgpu.Barrier(num_arrivals=7, num_barriers=2),
            mg.slots_ref((TILE, d), jnp.int8),
            mg.slots_ref((TILE, half_d), jnp.int8),
            plgpu.SMEM((2, TILE), jnp.bfloat16),
            mg.slots_ref((d, TILE // 2), jnp.int8),
            mg.slots_ref((d, TILE // 4), jnp.int8),
            plgpu.SMEM((2, TILE), jnp.bfloat16),
            plgpu.SMEM((2, TILE), jnp.uint8),
        ],
        interpret=interpret,
    )
    return run(
        meta, chosen, q_high, q_low, q_halves, coefficients, keys, keys_low, key_scale, values, values_low,
        value_scale, nu,
    )  # fmt: skip
