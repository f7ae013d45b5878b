"""One certified decode step in four kernels: scan, coarse, fine (which promotes), dense per head.

No conditional leaves the kernels: a kernel whose flags are all off returns at once, so that the host is never asked.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from certjax.cache import TieredKVCache
from certjax.certificate import Certificate
from certjax.fused import bound as bd
from certjax.fused import operands as ops
from certjax.fused import reduce as rd
from certjax.fused.ladder import heads_to_give_up
from certjax.fused.plan import Plan, choose
from certjax.fused.record import BOUNDS, certificate
from certjax.policy import Policy
from pallas_kernels import levels as lv
from pallas_kernels.dispatch import Kernels
from pallas_kernels.levels import FINEST, PROMOTED, SKIP
from pallas_kernels.originals.reference import LOWEST
from pallas_kernels.query import distinct, folded


def fused_attention(
    q: jax.Array,
    cache: TieredKVCache,
    layer: jax.Array,
    policy: Policy,
    kernels: Kernels,
    sound: jax.Array,
    common: ops.Shared | None = None,
) -> tuple[jax.Array, Certificate]:
    """As `certified_attention`, for one layer of a stacked cache.

    Parameters
    ----------
    q : `[b, Hkv, G, d]` float32
    cache
        Stacked, for which `fused_attention` is `supported`.
    layer : `[]` int32
    kernels
        From `pallas_kernels.dispatch`.
    sound : `[b]` bool
        Outcome of the preconditions; a row that is not sound goes dense.
    common
        `shared(cache)`, where it has been computed for all layers.
    """
    step = _Step(q, cache, layer, policy, kernels, common)
    scan = step.scan()
    plan = step.plan(scan)
    found = step.attend(scan, plan, promote=policy.tolerance is not None)
    judged = step.judge(found, plan)
    passed = step.consistent(scan, plan, found)
    return step.finish(judged, plan, passed, sound)


def fused_naive(
    q: jax.Array,
    cache: TieredKVCache,
    layer: jax.Array,
    policy: Policy,
    kernels: Kernels,
    common: ops.Shared | None = None,
) -> jax.Array:
    """Tier 1 at its finest and the windows, nothing checked: `[b, Hkv, G, d]` float32."""
    step = _Step(q, cache, layer, policy, kernels, common)
    plan = step.everything()
    found = step.attend(step.scan(only_windows=True), plan, promote=False, finest=True)
    return step.judge(found, plan).out[:, : q.shape[2]].reshape(q.shape)


class _Scan(NamedTuple):
    sums: bd.TileSums
    weights: jax.Array  # [H, NT, C, 128] bfloat16
    windows: bd.Exact


@dataclasses.dataclass
class _Step:
    q: jax.Array
    cache: TieredKVCache
    index: jax.Array
    policy: Policy
    kernels: Kernels
    common: ops.Shared | None

    def __post_init__(self):
        self.batch, self.n_heads, self.group, self.d = self.q.shape
        common = ops.shared(self.cache) if self.common is None else self.common
        self.layer = ops.layer_of(self.cache, self.index, common)
        self.queries = ops.prepare(self.q.reshape(-1, self.group, self.d), self.layer)
        self.n_tiles = self.cache.n_blocks

    def scan(self, only_windows: bool = False) -> _Scan:
        x, q = self.layer, self.queries
        meta = x.meta.at[:, 1].set(x.meta[:, 0]) if only_windows else x.meta
        stats, weights, acc, window_sums = self.kernels.scan(
            x.index, meta, q.kernel, x.keys, x.key_scale, x.value_scale, x.nu, x.live, x.windows
        )
        sums = bd.tile_sums(jnp.where(x.active[..., None, None], stats, 0.0), x)
        return _Scan(sums, weights, bd.exact_of(folded(acc), distinct(window_sums, 3)))

    def everything(self) -> Plan:
        """Tier 1 as finely as it is stored."""
        active = self.layer.active
        return Plan(jnp.where(active, FINEST, SKIP), jnp.zeros_like(active[:, 0]))

    def plan(self, scan: _Scan) -> Plan:
        if self.policy.tolerance is None:
            return self.everything()
        summed = bd.summing(self.d, self.additions, bd.TILE + self.n_tiles + 64)
        return choose(
            self.policy, self.batch, self.group, scan.sums, scan.weights, scan.windows, self.queries, self.layer, summed
        )

    def attend(self, scan: _Scan, plan: Plan, *, promote: bool, finest: bool = False) -> bd.Pass:
        """Read what a plan asks for; without `promote` it asks for nothing of tier 2, with `finest` for everything at
        its finest."""
        x, q = self.layer, self.queries
        counts = self.counts(plan)
        acc, stats, *host = self.kernels.fine(
            x.index, plan.words, counts, lv.summary_of(plan.words, self.d), q.kernel, x.keys, x.keys_low, x.key_scale,
            x.values, x.values_low, x.value_scale, x.nu, *((x.host_keys, x.host_values) if promote else (None, None)),
        )  # fmt: skip
        some = counts[:, lv.N_FINEST] + counts[:, lv.N_PROMOTED] > 0
        values = jnp.where(some[:, None, None], folded(acc.sum(1)), 0.0)
        if not finest:
            values += folded(self.kernels.coarse(x.index, plan.words, scan.weights, x.values).sum(1))
        exact = scan.windows
        if promote:
            exact = bd.joined(exact, _found(host, counts[:, lv.N_PROMOTED] > 0))
        return bd.Pass(scan.sums, bd.tile_sums(stats, x), lv.level_of_rest(plan.words, self.d), values, exact)

    def counts(self, plan: Plan) -> jax.Array:
        return lv.counts_of(plan.words, self.layer.active, plan.give_up)

    def dense(self, heads: jax.Array) -> bd.Exact:
        """Attend to all originals of `heads` `[H]`, and to nothing else."""
        x, q = self.layer, self.queries
        chosen = (jnp.arange(self.n_tiles) * ops.TILE < x.meta[:, 2:]) & heads[:, None]
        return _found(
            self.kernels.originals(
                x.index, x.meta, chosen.astype(jnp.int32), heads.astype(jnp.int32), q.kernel, x.host_keys,
                x.host_values, alone=True,
            ),
            heads,
            alone=True,
        )  # fmt: skip

    def consistent(self, scan: _Scan, plan: Plan, found: bd.Pass) -> jax.Array:
        """Canary: promoted tiles weigh by their originals, and by tier 1 at its finest where they are not read, what
        they weigh by tier 1 at its coarsest, within its bound: [b, Hkv, G]."""
        if not self.policy.canary or self.policy.tolerance is None:
            return jnp.ones((self.batch, self.n_heads, self.group), bool)
        q, promoted = self.queries, (lv.level_of(plan.words) == PROMOTED)[..., None]
        rest = promoted & (found.level == FINEST)[..., None]
        delta, delta_rest = (
            jnp.minimum(bd.delta_of(q, self.layer.kappa_peak[..., i]), 80.0) for i in range(2)
        )
        a, b = jnp.where(promoted, scan.sums.a, 0.0), jnp.where(rest, found.fine.a, 0.0)
        grow, grow_rest = jnp.exp(delta), jnp.exp(delta_rest)
        high, low, rest_high, rest_low = rd.sums(1, a * grow, a / grow, b * grow_rest, b / grow_rest)
        original = bd.eps_of_originals(q, found.exact.key, self.reads(plan), q.reference)
        slack = jnp.exp(q.eps + jnp.maximum(q.eps, original) + 2.0**-12)
        exact = found.exact.total - scan.windows.total
        rounding = 2.0**-18 * found.exact.total + 2.0**-100  # of the difference; of what was flushed
        alarm = (exact + rest_low > high * slack + rounding) | (exact + rest_high < low / slack - rounding)
        return self.grouped(~alarm)  # what is not a number is not an alarm: it fails as such

    def judge(self, found: bd.Pass, plan: Plan) -> bd.Judged:
        return bd.judge(found, self.queries, self.layer, self.reads(plan), self.additions)

    def reads(self, plan: Plan) -> jax.Array:
        """Most originals that a program read, of windows or pieces: [H, 1]."""
        n_promoted = self.counts(plan)[:, lv.N_PROMOTED, None]  # a program reads a piece of each tile of its share
        return jnp.minimum(n_promoted, most_pieces(self.per_program, self.d)) + 1

    @property
    def per_program(self) -> int:
        return per_program_of(self.n_tiles, self.kernels)

    @property
    def additions(self) -> int:
        return additions_of(self.n_tiles, self.kernels)

    def grouped(self, x):
        """`[H, G, ...]` of the padded group to `[b, Hkv, group, ...]`."""
        return x[:, : self.group].reshape(self.batch, self.n_heads, self.group, *x.shape[2:])

    def finish(self, judged: bd.Judged, plan: Plan, passed: jax.Array, sound: jax.Array):
        """Dense attention for the heads that need it, and the record."""
        out, e_total, norm = (self.grouped(x) for x in (judged.out, judged.e_total, judged.norm))
        row_failed = ~(sound & (jnp.isfinite(norm) & passed).all((1, 2)))  # [b]
        gone = plan.give_up.reshape(self.batch, -1)
        dense = heads_to_give_up(self.policy, norm, e_total, gone) | row_failed[:, None]  # [b, Hkv]
        found = self.dense(dense.reshape(-1))
        exact, exact_norm, error = bd.judge_dense(
            found, self.queries, self.cache.capacity, self.per_program, self.additions
        )
        out = jnp.where(dense[..., None, None], self.grouped(exact), out)
        e_total = jnp.where(dense[..., None], self.grouped(error), e_total)
        norm = jnp.where(dense[..., None], self.grouped(exact_norm), norm)
        return out, certificate(
            self.policy, self.cache, self.layer.live, self.counts(plan),
            lv.promoted_pieces(plan.words, self.d).sum((1, 2)).reshape(dense.shape),
            jnp.where(row_failed[:, None], 2, dense.astype(jnp.int32)), sound, passed,
            bounds={name: self.grouped(getattr(judged, name)) for name in BOUNDS},
            candidate_norm=self.grouped(judged.norm), norm=norm, e_total=e_total,
            tail_mass=self.grouped(judged.tail_mass), delta_max=self.grouped(judged.delta_max),
        )  # fmt: skip


def _found(host, some: jax.Array, *, alone: bool = False) -> bd.Exact:
    """Of the heads `[H]` that something was read of."""
    acc, sums = host
    some, nothing = some[:, None, None, None], jnp.array([0.0, 0.0, 0.0, LOWEST])[:, None]
    acc, sums = jnp.where(some, folded(acc), 0.0), jnp.where(some, distinct(sums, 3), nothing)
    return bd.exact_of(acc, sums, alone=alone)


def per_program_of(n_tiles: int, kernels: Kernels) -> int:
    """Most tiles that a program reads, or halves of tiles in the dense pass."""
    return -(-2 * n_tiles // kernels.fewest)


def most_pieces(per_program: int, d: int) -> int:
    """At least as many pieces as a program reads: one of every tile of its share, of which 32 programs make 4 or 8."""
    return per_program * lv.pieces_of_a_tile(d) // 2


def additions_of(n_tiles: int, kernels: Kernels) -> int:
    """Most float32 roundings that a tile's sum goes through on its way into the sum of all."""
    return 2 * per_program_of(n_tiles, kernels) + 2 * kernels.splits + 64
