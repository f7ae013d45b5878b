"""The step of `certjax.fused.attention` with nothing between its kernels: what XLA would do there in fifty small ones,
Triton kernels do in five.

They hand each other what they found in global memory: prepare, scan, judge, plan; coarse, fine, and judge again (which
do nothing where the plan of the step before has served); dense. What is done next with the output begins with
the candidate, beside all that comes after judge. What each of the small ones computes is written in `jnp` in
`operands`, `bound`, `plan` and `ladder`, its twins.
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
from certjax.fused.append import Token, token_of, with_windows
from certjax.fused.attention import additions_of, per_program_of
from certjax.fused.project import Again, Project, as_it_is
from certjax.fused.record import BOUNDS, Reads, certificate
from certjax.policy import Policy
from pallas_kernels import levels as lv
from pallas_kernels import numerics as num
from pallas_kernels.dispatch import Kernels


def chained_attention(
    q: jax.Array,
    cache: TieredKVCache,
    layer: jax.Array,
    policy: Policy,
    kernels: Kernels,
    sound: jax.Array,
    common: ops.Shared | None = None,
    project: Project = as_it_is,
    again: Again | None = None,
    token: Token | None = None,
) -> tuple[jax.Array, Certificate, jax.Array, TieredKVCache]:
    """As `fused_attention`, for a policy with a tolerance; and the cache, with `token`, where there is one, in the
    windows before anything reads them, and in tier 2 before the tiles that may be dense are read: nothing else waits
    for the bus.

    `again`: by default the output is projected whatever the candidate was projected to.
    """
    from pallas_kernels.judge import dense as dn
    from pallas_kernels.judge import record as rc
    from pallas_kernels.judge import triton as judging
    from pallas_kernels.judge.contract import Contract
    from pallas_kernels.judge.tally import tiles_and_parts
    from pallas_kernels.plan import triton as planning
    from pallas_kernels.prepare import triton as preparing

    batch, n_heads, group, d = q.shape
    common = ops.shared(cache) if common is None else common
    n_tiles, index, meta = cache.n_blocks, layer.astype(jnp.int32)[None], common.meta
    key_centre, value_centre = (ops.by_head(c) for c in (cache.stats.key_centre, cache.stats.value_centre))
    notes = {
        name: note.reshape(note.shape[0], -1, *note.shape[3:])
        for name, note in {
            "kappa": cache.notes.kappa.peak, "eta": cache.notes.eta.peak, "nu": cache.notes.nu.peak,
            "sigma_k": cache.notes.sigma_k, "sigma_v": cache.notes.sigma_v, "rho_k": cache.notes.rho_k,
            "rho_v": cache.notes.rho_v,
        }.items()
    }  # fmt: skip
    turn = ops.rotation_matrix(d)
    additions, halves = additions_of(n_tiles, kernels), per_program_of(n_tiles, kernels.fewest_dense)
    depth = bd.TILE + min(n_tiles, sum(tiles_and_parts(n_tiles))) + 64
    rounding = rc.Rounding(
        split=bd.summed(additions + depth), turning=ops.turning_back(d),
        depth_gamma=num.gamma(depth), inflate=inflate(2 * depth), vanished=ops.VANISHED, highest=bd.HIGHEST,
    )  # fmt: skip
    of_dense = rc.Rounding(
        split=bd.summed(additions), turning=0.0,
        depth_gamma=num.gamma(bd.TILE + cache.capacity // bd.TILE + 64), inflate=1.0, vanished=ops.VANISHED,
        highest=bd.HIGHEST,
    )  # fmt: skip

    contract = Contract(n_heads, group, policy.relative_to, policy.tolerance, policy.pooled)
    operands, facts, plan, arrived, windows = preparing.prepare_queries(
        q.reshape(-1, group, d), key_centre, common.largest, turn, index,
        (common.words, common.counts, common.summary),
        vanished=ops.VANISHED, room=ops.ROOM, tensor_unit=ops.TENSOR_UNIT,
        token=None if token is None else token_of(cache, *token),
    )  # fmt: skip
    if token is not None:
        cache = with_windows(cache, windows)
    x = ops.layer_of(cache, layer, common)
    tier1 = x.keys, x.keys_low, x.key_scale, x.values, x.values_low, x.value_scale, x.nu
    (stats, weights, values, *windows), fine = kernels.by_plan(
        index, meta, *plan, operands, tier1, x.live, x.windows, (x.host_keys, x.host_values)
    )
    of_layer = judging.Layer(notes, facts, common.largest, value_centre, turn, meta, index)

    def found(words, counts, summary, values, fine, fine_stats, host, host_sums):
        return judging.Found(
            words, counts, summary, stats, values, (fine, fine_stats), windows, (host, host_sums)
        )  # fmt: skip

    terms = planning.Terms(
        contract=contract, d=d, aim=pl.HEADROOM * policy.margin, host_fee=pl.host_fee(policy),
        max_promoted=policy.max_promoted, refresh=pl.REFRESH, least=pl.LEAST, summed=bd.summing(d, additions, depth),
    )  # fmt: skip
    out, record, arrived = judging.judge(
        found(*plan, values, *fine), of_layer, arrived, rounding, group=group, canary=policy.canary
    )
    # What is done next with the output begins with the candidate, while the rest finds out whether it will do.
    y = project(out.reshape(q.shape))
    asked, (words, counts, summary), held, verdict = planning.choose(
        stats, weights, record, plan[0], notes, facts, meta, index, sound, terms
    )
    if token is not None:
        cache = cache.write_originals(*token, layer, after=arrived[0])
    originals = ops.originals_of(cache)
    values = kernels.coarse(index, words, counts, weights, x.values, x.values_low)
    fine = kernels.fine_again(index, words, counts, summary, operands, *tier1, *originals)
    out, record, verdict, arrived = judging.judge_again(
        found(words, counts, summary, values, *fine), of_layer, asked, verdict, out, record, arrived, sound, rounding,
        contract, canary=policy.canary,
    )  # fmt: skip
    out, record, revised = dn.go_dense(
        index, meta, verdict, asked, operands, originals, facts, out, record, arrived, of_dense,
        splits=kernels.fewest_dense, reads=halves,
    )  # fmt: skip
    y = project(out.reshape(q.shape)) if again is None else again(y, out.reshape(q.shape), revised)
    rows = record[:, :, :group].reshape(batch, n_heads, -1, group)
    reads = plan[1:], (counts, summary)
    return y, certificate(
        policy, cache, x.live, jnp.where((asked == rc.REDO)[:, None], counts, plan[1]),
        [Reads(n, lv.n_pieces(x)) for n, x in reads],
        verdict.reshape(batch, n_heads), sound, rows[:, :, rc.PASSED.value] > 0,
        bounds={name: rows[:, :, getattr(rc, name.upper()).value] for name in BOUNDS},
        candidate_norm=rows[:, :, rc.NORM.value], norm=rows[:, :, rc.RETURNED_NORM.value],
        e_total=rows[:, :, rc.RETURNED_BOUND.value], tail_mass=rows[:, :, rc.TAIL_MASS.value],
        delta_max=rows[:, :, rc.DELTA_MAX.value],
    ), held[:, :n_tiles].astype(jnp.uint16).reshape(batch, n_heads, -1), cache  # fmt: skip
