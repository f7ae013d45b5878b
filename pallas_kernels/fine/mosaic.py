"""Second pass of a step on Mosaic GPU, second part: both planes of keys and values of chosen tiles, and originals of
promoted pieces, from the host.

Twin: `fine/reference.py`.
"""

from __future__ import annotations

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
    every_piece,
    level_of,
    pieces_of,
    tokens_of_a_piece,
)
from pallas_kernels.mosaic import SUMS
from pallas_kernels.originals.mosaic import attend_promoted_pieces, scratch_of_pieces
from pallas_kernels.query import HALF_FINE, LOW_UNIT, PARTS, SHIFT, UNIT, together

READERS = 32
"""Programs of a head that read from the host, where there is something to read, so that few pieces share one. They come
first: while they wait for the bus the others are at work."""


def attend_fine(layer, words, counts, summary, q, keys, keys_low, key_scale, values, values_low, value_scale, nu,
                host_keys, host_values, *, splits: int, interpret=False):  # fmt: skip
    n_layers, heads, n, d = keys.shape
    n_tiles, columns, half_d = n // TILE, q.parts.shape[2], d // 2
    words = mg.rows_of_flags(words)
    f32, rows = jnp.float32, words.shape[1:]
    host = () if host_keys is None else (host_keys, host_values)
    readers = READERS if host else 0

    def read_here(word):
        return (level_of(word) >= FINEST) & (pieces_of(word) != every_piece(d))

    def kernel(layer_ref, words_ref, counts_ref, summary_ref, q_ref, wide_ref, numbers_ref, *refs):
        (k_ref, low_ref, ks_ref, v_ref, v_low_ref, vs_ref, nu_ref), refs = refs[:7], refs[7:]
        host_refs, (acc_ref, stats_ref, *found_refs) = refs[: len(host)], refs[len(host) :]
        h, program = lax.axis_index("h"), lax.axis_index("s")
        layer, split = layer_ref[0], program - readers

        def refine(flags, summary, order, out, numbers, stats, queries_ready, ready, k, k_low, ks, v, v_low, vs, share,
                   w, *scratch):  # fmt: skip
            queries, halves = scratch[:PARTS], scratch[PARTS:]
            loads = (
                (words_ref.at[h], flags),
                (summary_ref.at[h], summary),
                (numbers_ref.at[h], numbers),
                *((q_ref.at[h, i], q) for i, q in enumerate(queries)),
                # Each part cut in the middle of its channels, as the fields of a key's lower plane are.
                *((wide_ref.at[h, i // 2, :, pl.ds(i % 2 * half_d, half_d)], q) for i, q in enumerate(halves)),
            )  # fmt: skip
            for source, target in loads:
                plgpu.copy_gmem_to_smem(source, target, queries_ready)
            plgpu.barrier_wait(queries_ready)
            count = mg.list_in_chunks(flags, summary, lambda n: n >= TILES_READ, read_here, order, split, splits)
            unit, low_unit, half, shift = (mg.over_rows(numbers[i], TILE) for i in (UNIT, LOW_UNIT, HALF_FINE, SHIFT))
            piece = lax.broadcasted_iota(jnp.int32, (TILE, columns), 0) // tokens_of_a_piece(d)

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
                pieces = pieces_of(mg.flag_of(flags, tile))
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
                elsewhere = lax.shift_right_logical(jnp.full_like(piece, pieces), piece) % 2 == 1
                p = jnp.where(elsewhere, jnp.zeros_like(p), p)  # read from the host
                scaled = mg.times(p, vs)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                mg.store_sums(p, scaled, share, ks, stats)
                mg.store_weights(scaled, w)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(stats, stats_ref.at[h, tile])
                acc = acc + mg.sum_products(d, mg.weighted(mg.fields(v[...], 4), w), interpret)
                acc_low = acc_low + mg.sum_products(d, mg.weighted(mg.fields(v_low[...], 2), w), interpret)
                plgpu.commit_smem()  # a barrier: no warp is at the tile any more
                return acc, acc_low

            zero = jnp.zeros((d, columns), f32)
            acc, acc_low = lax.fori_loop(0, count, visit, (zero, zero))
            # Codes came in units of 16 and 64; a value has 4 and 1.
            out[...] = acc * 0.25 + acc_low * (1 / 64)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, acc_ref.at[h, split])
            plgpu.wait_smem_to_gmem(0)

        some = counts_ref[h, N_FINEST] + counts_ref[h, N_PROMOTED] > 0

        @pl.when((program >= readers) & some)
        def _():
            pl.run_scoped(
                refine,
                plgpu.SMEM(rows, jnp.int32),
                plgpu.SMEM(summary.shape[1:], jnp.int32),
                plgpu.SMEM((-(-rows[0] * rows[1] // splits),), jnp.int32),
                plgpu.SMEM((d, columns), f32),
                plgpu.SMEM(q.numbers.shape[1:], f32),
                plgpu.SMEM((SUMS, columns), f32),
                plgpu.Barrier(num_arrivals=3 + 3 * PARTS),
                plgpu.Barrier(num_arrivals=7),
                mg.tile_ref((TILE, d), jnp.int8),
                mg.tile_ref((TILE, half_d), jnp.int8),
                plgpu.SMEM((TILE,), jnp.bfloat16),
                mg.tile_ref((d, TILE // 2), jnp.int8),
                mg.tile_ref((d, TILE // 4), jnp.int8),
                plgpu.SMEM((TILE,), jnp.bfloat16),
                plgpu.SMEM((TILE,), jnp.uint8),
                mg.weights_ref(columns),
                *[mg.tile_ref((columns, d), jnp.int8)] * PARTS,
                *[mg.tile_ref((columns, half_d), jnp.bfloat16)] * (2 * PARTS),
            )

        if readers:

            @pl.when((program < readers) & (counts_ref[h, N_PROMOTED] > 0))
            def _():
                read = attend_promoted_pieces(
                    h, program, layer, words_ref, summary_ref, wide_ref, numbers_ref, host_refs, found_refs, readers,
                    interpret=interpret,
                )  # fmt: skip
                pl.run_scoped(read, *scratch_of_pieces(rows, summary.shape[1:], readers, q))

    run = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((heads, splits, d, columns), f32),
            jax.ShapeDtypeStruct((heads, n_tiles, SUMS, columns), f32),
            *([jax.ShapeDtypeStruct((heads, readers, x, columns), f32) for x in (d, 4)] if readers else []),
        ],
        grid=(heads, readers + splits),
        grid_names=("h", "s"),
        kernel_name="attend_fine",
        compiler_params=mg.PARAMS,
        interpret=interpret,
    )
    return run(
        layer, words, counts, summary, q.parts, q.wide, q.numbers, keys, keys_low, key_scale, values, values_low,
        value_scale, nu, *host,
    )  # fmt: skip
