"""What few tiles need, on Mosaic GPU: both planes of keys and values of those at the finest level, and originals of
those that are promoted, from the host.

Twin: `refine/reference.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic as mg
from pallas_kernels.attend.tiles import FINEST, PROMOTED
from pallas_kernels.mosaic import SUMS, TILE
from pallas_kernels.originals.mosaic import attend_chosen_originals, scratch_of_originals
from pallas_kernels.query import HALF_FINE, LOW_UNIT, PARTS, SHIFT, UNIT, together

READERS = 5
"""Programs of a head that read from the host, where there is something to read: more than the bus needs."""

N_FINEST, N_PROMOTED = 2, 3
"""Columns of `counts`."""


def refine_tiles(layer, meta, levels, counts, q, keys, keys_low, key_scale, values, values_low, value_scale, nu,
                 host_keys, host_values, *, splits: int, interpret=False):  # fmt: skip
    n_layers, heads, n, d = keys.shape
    n_tiles, columns, half_d = n // TILE, q.parts.shape[2], d // 2
    levels = mg.rows_of_flags(levels)
    f32, rows = jnp.float32, levels.shape[1:]

    host = () if host_keys is None else (host_keys, host_values)
    readers = READERS if host else 0

    def kernel(layer_ref, meta_ref, levels_ref, counts_ref, q_ref, wide_ref, numbers_ref, *refs):
        (k_ref, low_ref, ks_ref, v_ref, v_low_ref, vs_ref, nu_ref), refs = refs[:7], refs[7:]
        host_refs, (acc_ref, stats_ref, *found_refs) = refs[: len(host)], refs[len(host) :]
        h, split = lax.axis_index("h"), lax.axis_index("s")

        def refine(flags, numbers, order, stats, out, barrier, ready, v, w, k, k_low, ks, v_low, vs, share, *scratch):
            queries, halves = scratch[:PARTS], scratch[PARTS:]
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
            count = mg.list_chosen(flags, FINEST, order, split, splits)
            unit, low_unit, half, shift = (mg.over_rows(numbers[i], TILE) for i in (UNIT, LOW_UNIT, HALF_FINE, SHIFT))

            def visit(i, carry):
                acc, acc_low = carry
                tile = order[i]
                here = pl.ds(tile * TILE, TILE)
                sources = (
                    (k_ref.at[layer, h, here], k), (low_ref.at[layer, h, here], k_low), (ks_ref.at[layer, h, here], ks),
                    (v_ref.at[layer, h, tile], v), (v_low_ref.at[layer, h, tile], v_low),
                    (vs_ref.at[layer, h, here], vs), (nu_ref.at[layer, h, here], share),
                )  # fmt: skip
                for source, target in sources:
                    plgpu.copy_gmem_to_smem(source, target, ready)
                plgpu.barrier_wait(ready)
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
                mg.store_sums(p, scaled, share, stats)
                mg.store_weights(scaled, w)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(stats, stats_ref.at[h, tile])
                acc = acc + mg.sum_products(d, mg.weighted(mg.fields(v[...], 4), w), interpret)
                acc_low = acc_low + mg.sum_products(d, mg.weighted(mg.fields(v_low[...], 2), w), interpret)
                plgpu.commit_smem()  # a barrier: no warp is at the tile any more
                return acc, acc_low

            acc, acc_low = lax.fori_loop(0, count, visit, (jnp.zeros((d, columns), f32),) * 2)
            out[...] = acc * 0.25 + acc_low * (1 / 64)  # codes came in units of 16 and 64; a value has 4 and 1
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, acc_ref.at[h, split])
            plgpu.wait_smem_to_gmem(0)

        if readers:

            @pl.when((split >= splits) & (counts_ref[h, N_PROMOTED] > 0))
            def _():
                read = attend_chosen_originals(
                    h, split - splits, layer_ref[0], meta_ref[h, 2], levels_ref, PROMOTED, wide_ref, numbers_ref,
                    host_refs, found_refs, readers, alone=False, interpret=interpret,
                )  # fmt: skip
                pl.run_scoped(read, *scratch_of_originals(rows, readers, q))

        @pl.when((split < splits) & (counts_ref[h, N_FINEST] > 0))
        def _():
            pl.run_scoped(
                refine,
                plgpu.SMEM(rows, jnp.int32),
                plgpu.SMEM(q.numbers.shape[1:], f32),
                plgpu.SMEM((-(-rows[0] * rows[1] // splits),), jnp.int32),
                plgpu.SMEM((SUMS, columns), f32),
                plgpu.SMEM((d, columns), f32),
                plgpu.Barrier(num_arrivals=2 + 3 * PARTS),
                plgpu.Barrier(num_arrivals=7),
                mg.tile_ref((d, TILE // 2), jnp.int8),
                mg.weights_ref(columns),
                mg.tile_ref((TILE, d), jnp.int8),
                mg.tile_ref((TILE, half_d), jnp.int8),
                plgpu.SMEM((TILE,), jnp.bfloat16),
                mg.tile_ref((d, TILE // 4), jnp.int8),
                plgpu.SMEM((TILE,), jnp.bfloat16),
                plgpu.SMEM((TILE,), jnp.uint8),
                *[mg.tile_ref((columns, d), jnp.int8)] * PARTS,
                *[mg.tile_ref((columns, half_d), jnp.bfloat16)] * (2 * PARTS),
            )

    run = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((heads, splits, d, columns), f32),
            jax.ShapeDtypeStruct((heads, n_tiles, SUMS, columns), f32),
            *([jax.ShapeDtypeStruct((heads, readers, x, columns), f32) for x in (d, 4)] if readers else []),
        ],
        grid=(heads, splits + readers),
        grid_names=("h", "s"),
        kernel_name="refine_tiles",
        compiler_params=mg.PARAMS,
        interpret=interpret,
    )
    return run(
        layer, meta, levels, counts, q.parts, q.wide, q.numbers, keys, keys_low, key_scale, values, values_low,
        value_scale, nu, *host,
    )  # fmt: skip
