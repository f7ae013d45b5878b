"""The step of `certjax.fused.attention` with nothing between its kernels: what XLA would do there in fifty small ones,
Triton kernels do in eight.

They are launched one after the other and hand each other what they found in global memory: prepare, scan, plan, coarse,
fine, judge, decide, dense, finish. What each of the small ones computes is written in `jnp` in `operands`, `plan`,
`bound` and `ladder`, its twins.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from certjax.bounds.arithmetic import inflate
from certjax.cache import TieredKVCache
from certjax.certificate import Certificate
from certjax.fused import bound as bd
from certjax.fused import operands as ops
from certjax.fused import plan as pl
from certjax.fused.attention import additions_of, most_pieces, per_program_of, tier1_bytes
from certjax.fused.ladder import allotted
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
    shape = (batch, n_heads, group)
    rows = record[:, :, :group].reshape(batch, n_heads, -1, group)
    final = returned[:, :, :group].reshape(batch, n_heads, 2, group)
    certificate = _certificate(
        policy, cache, x.live, rows, final, counts.reshape(batch, n_heads, -1, 1), summary.reshape(batch, n_heads, -1),
        verdict.reshape(batch, n_heads, 1), sound, jnp.zeros(shape), d, rc,
    )  # fmt: skip
    return out.reshape(q.shape), certificate


def _certificate(policy, cache, live, rows, final, counts, summary, verdict, sound, zero, d, rc) -> Certificate:
    """`rows` [b, Hkv, ROWS, G], `final` [b, Hkv, 2, G], `counts` [b, Hkv, COUNTS, 1], `summary` [b, Hkv, .],
    `verdict` [b, Hkv, 1]."""
    norm, e_total = final[:, :, 0], final[:, :, 1]
    dense = verdict > 0
    n_active, n_coarse, n_finest, n_promoted = (counts[:, :, i] + zero.astype(jnp.int32) for i in range(4))
    bounds = {
        name: rows[:, :, i]
        for name, i in {
            "e_key": rc.E_KEY, "e_val": rc.E_VAL, "e_arith": rc.E_ARITH, "e_total": rc.E_TOTAL,
            "e_key_paper": rc.E_KEY_PAPER, "e_val_paper": rc.E_VAL_PAPER,
        }.items()
    }  # fmt: skip
    returned = {name: jnp.where(dense, 0.0, x) for name, x in bounds.items()}
    returned |= {"e_total": e_total, "e_arith": jnp.where(dense, e_total, bounds["e_arith"])}
    candidate_norm = rows[:, :, rc.NORM]
    passed = rows[:, :, rc.PASSED] > 0
    first = (jnp.arange(zero.shape[-1]) == 0) & (zero == 0)
    windows = live.sum(1).reshape(*zero.shape[:2], 1) * (4.0 * d)
    tier1 = tier1_bytes(d, n_active, n_coarse, n_finest, n_promoted)
    n_pieces = (summary % lv.TILES_READ).sum(-1, keepdims=True)
    paged = (jnp.where(dense, cache.length[:, None, None], 0) + n_pieces * lv.tokens_of_a_piece(d)) * (4.0 * d)
    rung = jnp.where(dense, 2 + verdict, jnp.where(n_promoted > 0, 2, 0))
    true = zero == 0
    return Certificate(
        **returned,
        **{f"{name}_candidate": x for name, x in bounds.items()},
        out_norm=norm,
        out_norm_candidate=candidate_norm,
        tolerance=allotted(policy, norm, jnp.where(dense, 0.0, e_total)),
        tail_mass=rows[:, :, rc.TAIL_MASS],
        delta_max=rows[:, :, rc.DELTA_MAX],
        k_star=n_promoted,
        n_value_promoted=n_promoted,
        n_key_refined=n_finest,
        n_value_refined=n_finest,
        n_value_skipped=n_active - n_coarse - n_finest - n_promoted,
        rung=rung.astype(jnp.int32),
        ranking_ok=true,
        boundary_ok=true,
        canary_ok=passed,
        precondition_ok=true & sound[:, None, None] & jnp.isfinite(candidate_norm),
        bytes_read=jnp.where(first, tier1 + windows, 0.0),
        bytes_paged_in=jnp.where(first, paged, 0.0),
    )
