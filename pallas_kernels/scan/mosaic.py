"""First pass of a step on Mosaic GPU: every key at its coarsest level, the values that a plan asks for at theirs, the
windows in full; and all that a plan asks for at its finest and from the host, in the same programs.

Twins: `scan/reference.py`, `fine/reference.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic as mg
from pallas_kernels.fine.mosaic import Listed, attend_listed, listed, results
from pallas_kernels.levels import TILE, VALUES, by_scan, level_of
from pallas_kernels.mosaic import SUMS
from pallas_kernels.originals.mosaic import (
    ROWS,
    attend_original_tile,
    load_exact_queries,
    nothing,
    store_parts,
    store_result,
)
from pallas_kernels.query import HALF, PARTS, SHIFT, SHIFT_EXACT, UNIT, UNIT_EXACT
from pallas_kernels.scan.dealing import deal

STAGES = 2
"""Tiles whose keys are on their way into shared memory. Values are needed later in a visit, and have one slot: with
more there would be room for two programs on a processor, not three."""


class _Plane(NamedTuple):
    """Of values: of which levels it is read, where from and where to, and what its codes are (`mosaic.add_values`)."""

    read: Callable
    source: Any
    target: Any
    ready: Any
    coding: tuple[int, float]


class Fine(NamedTuple):
    """What `attend_fine` takes beyond `scan_tiles`."""

    counts: jax.Array
    summary: jax.Array
    keys_low: jax.Array
    host_keys: jax.Array
    host_values: jax.Array


def scan_and_fine(*operands, fine: tuple, splits: int, refiners: int, readers: int, interpret=False):
    """What `scan_tiles` and `attend_fine` return, of one kernel.

    Some programs of a head end with what is to be read at its finest or from the host, and read fewer tiles for it
    (`dealing`). In a kernel of its own that would have to find room beside the scan's programs, most of which have
    begun; and beside them, with the memory busy, it takes twice as long (docs/kernels.md).
    """
    found = _scan(*operands, Fine(*fine), splits, min(refiners, splits), readers, interpret)
    return found[:5], found[5:]


def scan_tiles(*operands, splits: int, interpret=False):
    return _scan(*operands, None, splits, 0, 0, interpret)


def _scan(
    layer, meta, words, q, keys, key_scale, values, values_low, value_scale, nu, live, windows, fine: Fine | None,
    splits: int, refiners: int, readers: int, interpret,
):  # fmt: skip
    heads, n, d = keys.shape[1:]
    n_tiles, columns, f32 = n // TILE, q.parts.shape[2], jnp.float32
    words = mg.rows_of_flags(words)
    if fine is not None:
        fine = fine._replace(summary=mg.rows_of_flags(fine.summary))
    numbers_shape = plgpu.SMEM(q.numbers.shape[1:], f32)
    places = [(i, j) for i in range(len(windows) // 2) for j in range(windows[2 * i].shape[2] // TILE)]

    def kernel(
        layer_ref, meta_ref, words_ref, q_ref, wide_ref, numbers_ref, k_ref, ks_ref, v_ref, v_low_ref, vs_ref, nu_ref,
        live_ref, *refs,
    ):  # fmt: skip
        window_refs, refs = refs[: len(windows)], refs[len(windows) :]
        fine_refs, refs = (Fine(*refs[: len(fine)]), refs[len(fine) :]) if fine else (None, refs)
        stats_ref, weights_ref, values_ref, acc_ref, sums_ref, *found_refs = refs
        h, split = lax.axis_index("h"), lax.axis_index("s")
        layer, first, end = layer_ref[0], meta_ref[h, 0], meta_ref[h, 1]
        some = listed(fine_refs.counts, h, refiners, readers) if fine else Listed(*[jnp.int32(0)] * 3)

        def stream(flags, numbers, stats, weights, out, barrier, ready, high_ready, low_ready, k, ks, vs, nu, v, v_low,
                   queries):  # fmt: skip
            def tile_at(i):
                return first + place_at(i)

            def fetch(i):
                @pl.when(i < count)
                def _():
                    slot, here = i % STAGES, pl.ds(tile_at(i) * TILE, TILE)
                    for source, target in ((k_ref, k), (ks_ref, ks), (vs_ref, vs), (nu_ref, nu)):
                        plgpu.copy_gmem_to_smem(source.at[layer, h, here], target.at[slot], ready.at[slot])

            planes = (
                _Plane(by_scan, v_ref, v, high_ready, mg.HIGH),
                _Plane(lambda level: level == VALUES, v_low_ref, v_low, low_ready, mg.LOW),
            )

            def fetch_values(plane, i):
                tile = jnp.minimum(tile_at(i), n_tiles - 1)

                @pl.when((i < count) & plane.read(level_of(mg.flag_of(flags, tile))))
                def _():
                    plgpu.copy_gmem_to_smem(plane.source.at[layer, h, tile], plane.target, plane.ready)

            # Begun in the order in which they are needed: what all tiles need is little, and would come last.
            plgpu.copy_gmem_to_smem(words_ref.at[h], flags, barrier)
            plgpu.copy_gmem_to_smem(numbers_ref.at[h], numbers, barrier)
            plgpu.copy_gmem_to_smem(q_ref.at[h], queries, barrier)
            fetch(jnp.int32(0))
            plgpu.barrier_wait(barrier)
            for plane in planes:
                fetch_values(plane, jnp.int32(0))
            for i in range(1, STAGES):
                fetch(jnp.int32(i))
            unit, half, shift = (mg.over_rows(numbers[i], TILE) for i in (UNIT, HALF, SHIFT))

            def visit(i, acc):
                slot, tile, parity = i % STAGES, tile_at(i), i % 2
                plgpu.barrier_wait(ready.at[slot])
                dot = mg.integer_dot(k.at[slot], mg.parts_of(queries))
                w = jnp.exp2(mg.times(dot * unit + half, ks.at[slot]) + shift)
                scaled = mg.times(w, vs.at[slot])
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the parity's last copies have left it
                for j, x in enumerate(mg.sums_of(w, scaled, nu.at[slot], ks.at[slot])):
                    stats[parity, j] = x
                mg.store_weights(scaled, weights.at[parity])
                plgpu.commit_smem()  # a barrier: no warp is at the tile's keys any more
                plgpu.copy_smem_to_gmem(stats.at[parity], stats_ref.at[h, tile], commit_group=False)
                plgpu.copy_smem_to_gmem(weights.at[parity], weights_ref.at[h, tile])
                fetch(i + STAGES)

                level = level_of(mg.flag_of(flags, tile))
                for plane in planes:

                    def with_values(*acc, plane=plane):
                        plgpu.barrier_wait(plane.ready)
                        acc = mg.add_values(acc, plane.target, plane.coding, weights.at[parity], interpret)
                        plgpu.commit_smem()  # a barrier: nor at its values
                        return acc

                    acc = lax.cond(plane.read(level), with_values, lambda *acc: acc, *acc)
                    fetch_values(plane, i + 1)
                return acc

            acc = lax.fori_loop(0, count, visit, (jnp.zeros((ROWS, columns), f32),) * (d // ROWS))
            store_parts(acc, out, values_ref.at[h, split])
            plgpu.wait_smem_to_gmem(0)

        def without_tiles(out):
            store_parts((jnp.zeros((ROWS, columns), f32),) * (d // ROWS), out, values_ref.at[h, split])
            plgpu.wait_smem_to_gmem(0)

        count, place_at = deal(split, splits, end - first, some.refining, some.reading, some.tiles)

        # The scan first: the device fetches the beginning of a kernel's code ahead, and what nearly every program
        # begins with would take twice as long behind the rest.
        pl.when((split < splits) & (count == 0))(lambda: pl.run_scoped(without_tiles, plgpu.SMEM((d, columns), f32)))

        @pl.when((split < splits) & (count > 0))
        def _():
            pl.run_scoped(
                stream,
                plgpu.SMEM(words.shape[1:], jnp.int32),
                numbers_shape,
                plgpu.SMEM((2, SUMS, columns), f32),
                mg.weights_ref(columns, 2),
                plgpu.SMEM((d, columns), f32),
                plgpu.Barrier(num_arrivals=3),
                plgpu.Barrier(num_arrivals=4, num_barriers=STAGES),
                plgpu.Barrier(num_arrivals=1),
                plgpu.Barrier(num_arrivals=1),
                mg.tile_ref((TILE, d), jnp.int8, STAGES),
                plgpu.SMEM((STAGES, TILE), jnp.bfloat16),
                plgpu.SMEM((STAGES, TILE), jnp.bfloat16),
                plgpu.SMEM((STAGES, TILE), jnp.uint8),
                mg.tile_ref((d, TILE // 2), jnp.int8),
                mg.tile_ref((d, TILE // 4), jnp.int8),
                mg.tile_ref((columns, d), jnp.int8, PARTS),
            )

        if fine is not None:
            _, summary_ref, low_ref, *host_refs = fine_refs
            attend_listed(
                h, layer, some, split, splits - 1 - split, refiners, readers, (words_ref, summary_ref),
                (q_ref, wide_ref, numbers_ref), (k_ref, low_ref, ks_ref, v_ref, v_low_ref, vs_ref, nu_ref), host_refs,
                found_refs, interpret, programs=splits,
            )  # fmt: skip

        def window(numbers, out, sums, barrier, values_barrier, tile, weights, queries):
            index = split - splits

            def fetch(keys_or_values: int, barrier):
                for i, (which, at) in enumerate(places):
                    source = window_refs[2 * which + keys_or_values].at[layer, h, pl.ds(at * TILE, TILE)]
                    pl.when(index == i)(lambda source=source: plgpu.copy_gmem_to_smem(source, tile, barrier))

            fetch(0, barrier)
            load_exact_queries(h, wide_ref, numbers_ref, queries, numbers, barrier)
            plgpu.barrier_wait(barrier)
            unit, shift = (mg.over_rows(numbers[i], TILE) for i in (UNIT_EXACT, SHIFT_EXACT))

            def values_ready():
                fetch(1, values_barrier)
                plgpu.barrier_wait(values_barrier)

            carry = attend_original_tile(
                live_ref[h, index], mg.parts_of(queries), unit, shift, tile, tile, weights, nothing(d, columns),
                interpret, values_ready,
            )  # fmt: skip
            store_result(carry, out, sums, acc_ref.at[h, index], sums_ref.at[h, index])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(split >= splits)
        def _():
            pl.run_scoped(
                window,
                numbers_shape,
                plgpu.SMEM((d, columns), jnp.float32),
                plgpu.SMEM((4, columns), jnp.float32),
                plgpu.Barrier(num_arrivals=2 + PARTS),
                plgpu.Barrier(num_arrivals=1),
                mg.tile_ref((TILE, d), jnp.bfloat16),
                mg.weights_ref(columns),
                mg.tile_ref((columns, d), jnp.bfloat16, PARTS),
            )

    run = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((heads, n_tiles, SUMS, columns), f32),
            jax.ShapeDtypeStruct((heads, n_tiles, columns, TILE), jnp.bfloat16),
            jax.ShapeDtypeStruct((heads, splits, d, columns), f32),
            jax.ShapeDtypeStruct((heads, len(places), d, columns), f32),
            jax.ShapeDtypeStruct((heads, len(places), 4, columns), f32),
            *(results(heads, n, d, columns, refiners, readers) if fine else ()),
        ],
        grid=(heads, splits + len(places)),
        grid_names=("h", "s"),
        kernel_name="scan_tiles",
        compiler_params=mg.PARAMS,
        interpret=interpret,
    )
    return run(
        layer, meta, words, q.parts, q.wide, q.numbers, keys, key_scale, values, values_low, value_scale, nu, live,
        *windows, *(fine or ()),
    )  # fmt: skip
