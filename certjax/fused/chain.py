"""The step of `certjax.fused.attention` with nothing between its kernels: what XLA would do there in fifty small ones,
Triton kernels do in eight.

They are launched one after the other and hand each other what they found in global memory: prepare, scan, plan, coarse,
fine, judge, decide, dense, finish. What each of the small ones computes is written in `jnp` in `operands`, `plan`,
`bound` and `ladder`, its twins.
"""

from __future__ import annotations

import jax

from certjax.bounds.arithmetic import inflate
from certjax.cache import TieredKVCache
from certjax.certificate import Certificate
from certjax.fused import bound as bd
from certjax.fused import operands as ops
from certjax.fused import plan as pl
from certjax.fused.attention import additions_of, most_pieces, per_program_of
from certjax.fused.record import BOUNDS, certificate
from certjax.policy import Policy
from pallas_kernels import levels as lv
from pallas_kernels import numerics as num
from pallas_kernels import query as qr
from pallas_kernels.dispatch import Kernels


def chained_attention(
    q: jax.Array,
    cache: TieredKVCache,
    layer: jax.Array,
    policy: Policy,
    kernels: Kernels,
    sound: jax.Array,
    common: ops.Shared | None = None,
) -> tuple[jax.Array, Certificate]:
    """As `fused_attention`, for a policy with a tolerance."""
    from pallas_kernels.judge import record as rc
    from pallas_kernels.judge import triton as judging
    from pallas_kernels.judge import verdict as vd
    from pallas_kernels.plan import triton as planning
    from pallas_kernels.prepare import triton as preparing

    batch, n_heads, group, d = q.shape
    common = ops.shared(cache) if common is None else common
    x = ops.layer_of(cache, layer, common)
    n_tiles, index, meta = cache.n_blocks, x.index, x.meta
    key_centre, value_centre = (ops.by_head(c) for c in (cache.stats.key_centre, cache.stats.value_centre))
    notes = {
        name: note.reshape(note.shape[0], -1, *note.shape[3:])
        for name, note in {
            "kappa": cache.notes.kappa.peak, "eta": cache.notes.eta.peak, "nu": cache.notes.nu.peak,
            "sigma_k": cache.notes.sigma_k, "sigma_v": cache.notes.sigma_v, "rho_k": cache.notes.rho_k,
            "rho_v": cache.notes.rho_v,
        }.items()
    }  # fmt: skip
    turn, (_, flags) = ops.rotation_matrix(d), qr.row_of_flags(n_tiles)
    tiles, additions = per_program_of(n_tiles, kernels), additions_of(n_tiles, kernels)
    depth = bd.TILE + min(n_tiles, sum(judging.tiles_and_parts(n_tiles))) + 64
    rounding = rc.Rounding(
        reads=most_pieces(tiles, d), split=bd.summed(additions + depth), turning=ops.turning_back(d),
        depth_gamma=num.gamma(depth), inflate=inflate(2 * depth), vanished=ops.VANISHED, highest=bd.HIGHEST,
    )  # fmt: skip
    of_dense = rc.Rounding(
        reads=tiles, split=bd.summed(additions), turning=0.0,
        depth_gamma=num.gamma(bd.TILE + cache.capacity // bd.TILE + 64), inflate=1.0, vanished=ops.VANISHED,
        highest=bd.HIGHEST,
    )  # fmt: skip

    operands, facts = preparing.prepare_queries(
        q.reshape(-1, group, d), key_centre, common.largest, turn, index,
        vanished=ops.VANISHED, room=ops.ROOM, tensor_unit=ops.TENSOR_UNIT,
    )  # fmt: skip
    stats, weights, *windows = kernels.scan(
        index, meta, operands, x.keys, x.key_scale, x.value_scale, x.nu, x.live, x.windows
    )
    terms = planning.Terms(
        heads=n_heads, group=group, relative_to=policy.relative_to, tolerance=policy.tolerance, margin=policy.margin,
        pooled=policy.pooled, coarse_fee=pl.COARSE_BYTES / pl.FINEST_BYTES,
        host_fee=policy.host_price * pl.ORIGINAL_BYTES / pl.FINEST_BYTES, max_promoted=policy.max_promoted,
        highest=bd.HIGHEST, summed=bd.summing(d, additions, depth),
    )  # fmt: skip
    words, counts, summary = planning.choose(
        (stats, weights, *windows), notes, facts, common.largest, value_centre, cache.aim, meta, index, terms, flags
    )
    coarse = kernels.coarse(index, words, weights, x.values)
    *fine, host_acc, host_sums = kernels.fine(
        index, words, counts, summary, operands, x.keys, x.keys_low, x.key_scale, x.values, x.values_low, x.value_scale,
        x.nu, x.host_keys, x.host_values,
    )  # fmt: skip
    candidate, record = judging.judge(
        words, stats, coarse, fine, windows, (host_acc, host_sums), counts, notes, facts, common.largest, value_centre,
        turn, meta, index, rounding, canary=policy.canary,
    )  # fmt: skip
    verdict, everything = vd.decide(
        record, counts, sound, meta, n_tiles, flags, group=group, relative_to=policy.relative_to,
        tolerance=policy.tolerance, pooled=policy.pooled,
    )  # fmt: skip
    found = kernels.originals(
        index, meta, everything, verdict, operands, x.host_keys, x.host_values, alone=True
    )
    out, returned = vd.finish(
        candidate, record, verdict, found, facts, of_dense, group=group, capacity=cache.capacity
    )
    shape = (batch, n_heads, -1, group)
    rows = record[:, :, :group].reshape(shape)
    final = returned[:, :, :group].reshape(shape)
    n_pieces = (summary % lv.TILES_READ).sum(1)
    return out.reshape(q.shape), certificate(
        policy, cache, x.live, counts, n_pieces.reshape(batch, n_heads), verdict.reshape(batch, n_heads), sound,
        rows[:, :, rc.PASSED] > 0, bounds={name: rows[:, :, getattr(rc, name.upper())] for name in BOUNDS},
        candidate_norm=rows[:, :, rc.NORM], norm=final[:, :, 0], e_total=final[:, :, 1],
        tail_mass=rows[:, :, rc.TAIL_MASS], delta_max=rows[:, :, rc.DELTA_MAX],
    )  # fmt: skip
