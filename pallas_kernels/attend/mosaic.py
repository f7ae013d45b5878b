"""Second pass of a step on Mosaic GPU: the values of chosen tiles, and the keys of those at the finest level.

Twin: `attend/tiles.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic as mg
from pallas_kernels.attend.tiles import FINEST
from pallas_kernels.mosaic import SUMS, TILE
from pallas_kernels.query import HALF_FINE, LOW_UNIT, PARTS, SHIFT, UNIT, distinct, folded, together

AHEAD = 3
"""Tiles of coarse values on their way into shared memory."""


def attend_tiles(layer, levels, weights, q, keys, keys_low, key_scale, values, values_low, value_scale, nu, *,
                 splits: int, interpret=False):  # fmt: skip
    n_layers, heads, n, d = keys.shape
    n_tiles, columns, half_d = n // TILE, q.parts.shape[2], d // 2
    levels = mg.rows_of_flags(levels)

    def kernel(layer_ref, levels_ref, w_ref, q_ref, wide_ref, numbers_ref, *refs):
        (k_ref, low_ref, ks_ref, v_ref, v_low_ref, vs_ref, nu_ref), (acc_ref, stats_ref), scratch = (
            refs[:7], refs[7:9], refs[9:],
        )  # fmt: skip
        flags, numbers, order, stats, out, barrier, ready, ready_fine, v, w, *scratch = scratch
        k, k_low, ks, v_low, vs, share, *scratch = scratch
        queries, halves = scratch[:PARTS], scratch[PARTS:]
        h, split = lax.axis_index("h"), lax.axis_index("s")
        layer = layer_ref[0]
        loads = (
            (levels_ref.at[h], flags), (numbers_ref.at[h], numbers),
            *((q_ref.at[h, i], q) for i, q in enumerate(queries)),
            # Each part cut in the middle of its channels, as the fields of a key's lower plane are.
            *((wide_ref.at[h, i // 2, :, pl.ds(i % 2 * half_d, half_d)], q) for i, q in enumerate(halves)),
        )  # fmt: skip
        for source, target in loads:
            plgpu.copy_gmem_to_smem(source, target, barrier)
        plgpu.barrier_wait(barrier)
        zero = jnp.zeros((d, columns), jnp.float32)

        # Tiles at level 1: the scan's weights, the upper plane of the values.
        count = mg.list_chosen(flags, 1, order, split, splits)

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
            acc = acc + mg.sum_products(d, mg.weighted(mg.fields(v[slot], 4), w.at[slot]), interpret)
            plgpu.commit_smem()  # a barrier: no warp is at the tile any more
            fetch(i + AHEAD)
            return acc

        acc = lax.fori_loop(0, count, visit, zero)

        # Tiles at the finest level: both planes of keys and values.
        count_fine = mg.list_chosen(flags, FINEST, order, split, splits)
        unit, low_unit, half, shift = (mg.over_rows(numbers[i], TILE) for i in (UNIT, LOW_UNIT, HALF_FINE, SHIFT))

        def visit_fine(i, carry):
            acc, acc_low = carry
            tile = order[i]
            rows = pl.ds(tile * TILE, TILE)
            sources = (
                (k_ref.at[layer, h, rows], k), (low_ref.at[layer, h, rows], k_low), (ks_ref.at[layer, h, rows], ks),
                (v_ref.at[layer, h, tile], v.at[0]), (v_low_ref.at[layer, h, tile], v_low),
                (vs_ref.at[layer, h, rows], vs), (nu_ref.at[layer, h, rows], share),
            )  # fmt: skip
            for source, target in sources:
                plgpu.copy_gmem_to_smem(source, target, ready_fine)
            plgpu.barrier_wait(ready_fine)
            x = mg.integer_dot(k, queries) * unit
            fields = mg.fields(k_low[...], 4)
            low = [
                mg.sum_products(
                    TILE, [(f, q.transpose((1, 0))) for f, q in zip(fields, halves[2 * j : 2 * j + 2], strict=True)],
                    interpret,
                )
                for j in range(PARTS)
            ]  # fmt: skip
            p = jnp.exp2(mg.times(x + together(low) * low_unit + half, ks) + shift)
            scaled = mg.times(p, vs)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            mg.store_sums(p, scaled, share, stats)
            mg.store_weights(scaled, w.at[0])
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(stats, stats_ref.at[h, tile])
            acc = acc + mg.sum_products(d, mg.weighted(mg.fields(v[0], 4), w.at[0]), interpret)
            acc_low = acc_low + mg.sum_products(d, mg.weighted(mg.fields(v_low[...], 2), w.at[0]), interpret)
            plgpu.commit_smem()  # a barrier: no warp is at the tile any more
            return acc, acc_low

        acc, acc_low = lax.fori_loop(0, count_fine, visit_fine, (acc, zero))
        out[...] = acc * 0.25 + acc_low * (1 / 64)  # codes came in units of 16 and 64; a value has 4 and 1
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out, acc_ref.at[h, split])
        plgpu.wait_smem_to_gmem(0)

    f32 = jnp.float32
    run = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((heads, splits, d, columns), f32),
            jax.ShapeDtypeStruct((heads, n_tiles, SUMS, columns), f32),
        ],
        grid=(heads, splits),
        grid_names=("h", "s"),
        compiler_params=mg.PARAMS,
        scratch_types=[
            plgpu.SMEM(levels.shape[1:], jnp.int32),
            plgpu.SMEM(q.numbers.shape[1:], f32),
            plgpu.SMEM((-(-levels.shape[1] * levels.shape[2] // splits),), jnp.int32),
            plgpu.SMEM((SUMS, columns), f32),
            plgpu.SMEM((d, columns), f32),
            plgpu.Barrier(num_arrivals=2 + 3 * PARTS),
            plgpu.Barrier(num_arrivals=2, num_barriers=AHEAD),
            plgpu.Barrier(num_arrivals=7),
            mg.tile_ref((d, TILE // 2), jnp.int8, AHEAD),
            mg.weights_ref(columns, AHEAD),
            mg.tile_ref((TILE, d), jnp.int8),
            mg.tile_ref((TILE, half_d), jnp.int8),
            plgpu.SMEM((TILE,), jnp.bfloat16),
            mg.tile_ref((d, TILE // 4), jnp.int8),
            plgpu.SMEM((TILE,), jnp.bfloat16),
            plgpu.SMEM((TILE,), jnp.uint8),
            *[mg.tile_ref((columns, d), jnp.int8)] * PARTS,
            *[mg.tile_ref((columns, half_d), jnp.bfloat16)] * (2 * PARTS),
        ],
        interpret=interpret,
    )
    acc, stats = run(
        layer, levels, weights, q.parts, q.wide, q.numbers, keys, keys_low, key_scale, values, values_low, value_scale,
        nu,
    )  # fmt: skip
    return folded(acc), distinct(stats, 3)
