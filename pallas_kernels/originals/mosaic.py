"""Attention over original keys and values on Mosaic GPU: windows on the device, blocks of tier 2 from host memory.

Twin: `originals/reference.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic as mg
from pallas_kernels.mosaic import TILE
from pallas_kernels.query import PARTS, SHIFT_EXACT, UNIT_EXACT, distinct, folded, together

LOWEST = -1e30
"""Score of what is not attended to."""


def attend_original_tile(keys, values, live, queries, unit, shift, buffers, carry, interpret):
    """One tile of originals in global memory (of the device or of the host): [TILE, d] bfloat16 each, `live` tokens."""
    k, v, weights = buffers
    acc, total, k_max, v_max, peak = carry  # the squares of the longest key and value; the largest score
    d, columns = keys.shape[-1], unit.shape[1]
    copied = plgpu.Layout.SMEM_GMEM_COPY((TILE, d), jnp.bfloat16, plgpu.find_swizzle(16 * d))
    plgpu.commit_smem()  # a barrier: no warp reads the tile before any more
    k[...] = plgpu.load(keys, layout=copied, optimized=False)
    v[...] = plgpu.load(values, layout=copied, optimized=False)
    plgpu.commit_smem()

    x = together([mg.sum_products(TILE, [(k, q.transpose((1, 0)))], interpret) for q in queries]) * unit + shift
    seen = lax.broadcasted_iota(jnp.int32, (TILE, columns), 0) < live
    x = jnp.where(seen, x, jnp.full((TILE, columns), LOWEST, jnp.float32))
    higher = jnp.maximum(peak, x.max(axis=0))
    shrink = jnp.exp2(peak - higher)
    p = jnp.exp2(x - mg.over_rows(higher, TILE))
    p = jnp.where(seen, p, jnp.zeros((TILE, columns), jnp.float32))
    mg.store_weights(p, weights)
    plgpu.commit_smem()
    turned = v.transpose((1, 0))[...]
    product = mg.sum_products(d, [(turned, weights.transpose((1, 0)))], interpret)
    acc = acc * mg.over_rows(shrink, d) + product

    def largest(ref):
        x = ref[...].astype(jnp.float32)
        return mg.over_columns((x * x).sum(axis=1), columns).max(axis=0)

    total = total * shrink + p.sum(axis=0)
    return acc, total, jnp.maximum(k_max, largest(k)), jnp.maximum(v_max, largest(v)), higher


def scratch_of_a_tile(d: int, columns: int) -> list:
    """Shared memory for `attend_original_tile`."""
    return [*[mg.tile_ref((TILE, d), jnp.bfloat16)] * 2, mg.weights_ref(columns)]


def load_exact_queries(h, q_ref, numbers_ref, queries, numbers, barrier) -> None:
    """Start `PARTS + 1` copies: the parts of the queries as they are, and the numbers."""
    for i, q in enumerate(queries):
        plgpu.copy_gmem_to_smem(q_ref.at[h, PARTS + i], q, barrier)
    plgpu.copy_gmem_to_smem(numbers_ref.at[h], numbers, barrier)


def nothing(d: int, columns: int):
    zero = jnp.zeros((columns,), jnp.float32)
    return jnp.zeros((d, columns), jnp.float32), zero, zero, zero, jnp.full((columns,), LOWEST, jnp.float32)


def store_result(carry, out, sums, out_ref, sums_ref) -> None:
    acc, *rest = carry
    out[...] = acc
    for i, row in enumerate(rest):
        sums[i] = row
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out, out_ref)
    plgpu.copy_smem_to_gmem(sums, sums_ref)


def attend_originals(layer, meta, chosen, q, keys, values, *, splits: int, alone=False, interpret=False):
    n_layers, heads, n, d = keys.shape
    columns = q.parts.shape[2]
    chosen = mg.rows_of_flags(chosen)

    def kernel(layer_ref, meta_ref, chosen_ref, q_ref, numbers_ref, k_ref, v_ref, acc_ref, sums_ref, *scratch):
        flags, numbers, order, out, sums, barrier, *rest = scratch
        queries, buffers = rest[:PARTS], rest[PARTS:]
        h, split = lax.axis_index("h"), lax.axis_index("s")
        layer, length = layer_ref[0], meta_ref[h, 2]
        plgpu.copy_gmem_to_smem(chosen_ref.at[h], flags, barrier)
        load_exact_queries(h, q_ref, numbers_ref, queries, numbers, barrier)
        plgpu.barrier_wait(barrier)

        count = mg.list_chosen(flags, 1, order, split, splits)
        unit = mg.over_rows(numbers[UNIT_EXACT], TILE)
        shift = jnp.zeros((TILE, columns), jnp.float32) if alone else mg.over_rows(numbers[SHIFT_EXACT], TILE)

        def visit(i, carry):
            start = order[i] * TILE
            here = pl.ds(start, TILE)
            return attend_original_tile(
                k_ref.at[layer, h, here], v_ref.at[layer, h, here], length - start, queries, unit, shift, buffers,
                carry, interpret,
            )  # fmt: skip

        carry = lax.fori_loop(0, count, visit, nothing(d, columns))
        store_result(carry, out, sums, acc_ref.at[h, split], sums_ref.at[h, split])
        plgpu.wait_smem_to_gmem(0)

    f32 = jnp.float32
    run = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((heads, splits, d, columns), f32),
            jax.ShapeDtypeStruct((heads, splits, 4, columns), f32),
        ],
        grid=(heads, splits),
        grid_names=("h", "s"),
        compiler_params=mg.PARAMS,
        scratch_types=[
            plgpu.SMEM(chosen.shape[1:], jnp.int32),
            plgpu.SMEM(q.numbers.shape[1:], f32),
            plgpu.SMEM((-(-chosen.shape[1] * chosen.shape[2] // splits),), jnp.int32),
            plgpu.SMEM((d, columns), f32),
            plgpu.SMEM((4, columns), f32),
            plgpu.Barrier(num_arrivals=2 + PARTS),
            *[mg.tile_ref((columns, d), jnp.bfloat16)] * PARTS,
            *scratch_of_a_tile(d, columns),
        ],
        interpret=interpret,
    )
    acc, sums = run(layer, meta, chosen, q.wide, q.numbers, keys, values)
    return folded(acc), distinct(sums, 3)
