"""One certified decode step in kernels: scan and fine (which promotes) by the plan of the step before; where the bound
does not hold, coarse and fine by a new one; dense per head.

No conditional leaves the kernels: a kernel whose flags are all off returns at once, so that the host is never asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from certjax.cache import TieredKVCache
from certjax.certificate import Certificate
from certjax.fused import bound as bd
from certjax.fused import operands as ops
from certjax.fused import reduce as rd
from certjax.fused.ladder import heads_to_give_up
from certjax.fused.plan import Plan, choose, due, held
from certjax.fused.project import Project, as_it_is
from certjax.fused.record import BOUNDS, Reads, certificate
from certjax.policy import Policy
from pallas_kernels import levels as lv
from pallas_kernels.dispatch import Kernels
from pallas_kernels.levels import FINEST, PROMOTED
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
    project: Project = as_it_is,
) -> tuple[jax.Array, Certificate, jax.Array | None]:
    """As `certified_layer`, for one layer of a stacked cache; and the plan for the next step, `[b, Hkv, NB]`
    (`cache.plan`), where the policy has a tolerance.

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
    project
        Takes the output, `[b, Hkv, G, d]`; what it makes of that is returned in its place.
    """
    step = _Step(q, cache, layer, policy, kernels, common)
    scan = step.scan()
    plan = step.plan()
    if policy.tolerance is None:
        first = step.attempt(scan, plan, scan.coarse, step.fine(kernels.fine, plan))
        out, certificate = step.finish(first, None, sound)
        return project(out), certificate, None
    first = step.attempt(scan, plan, scan.coarse, step.fine(kernels.fine_again, plan))
    fresh = step.fresh(scan, first.judged)
    again = step.again(first.judged)
    second = step.attempt(scan, fresh, step.values_by_scan(scan, fresh), step.fine(kernels.fine_again, fresh))
    second = second.replace(passed=second.passed & first.passed)
    words = held(plan.words, fresh, again | step.by_head(due(cache.length, layer)), step.layer.active)
    out, certificate = step.finish(first, (again, second), sound)
    return project(out), certificate, words.reshape(cache.plan.shape[1:])


def fused_naive(
    q: jax.Array,
    cache: TieredKVCache,
    layer: jax.Array,
    policy: Policy,
    kernels: Kernels,
    common: ops.Shared | None = None,
) -> jax.Array:
    """Tier 1 at its finest and the windows, nothing checked: `[b, Hkv, G, d]` float32."""
    step = _Step(q, cache, layer, policy, kernels, ops.shared(cache, finest=True) if common is None else common)
    plan, scan = step.plan(), step.scan(only_windows=True)
    found = step.joined(scan, plan, scan.coarse, step.fine(kernels.fine, plan))
    return step.judge(found, plan).out[:, : q.shape[2]].reshape(q.shape)


class _Scan(NamedTuple):
    sums: bd.TileSums
    weights: jax.Array  # [H, NT, C, 128] bfloat16
    coarse: jax.Array  # [H, d, G], of tiles whose values the plan reads with these weights
    windows: bd.Exact


@struct.dataclass
class _Attempt:
    """What came of reading by a plan."""

    plan: Plan
    judged: bd.Judged
    passed: jax.Array  # [b, Hkv, G] bool, the canary


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
        common = ops.shared(self.cache, self.policy.tolerance is None) if self.common is None else self.common
        self.layer = ops.layer_of(self.cache, self.index, common)
        self.queries = ops.prepare(self.q.reshape(-1, self.group, self.d), self.layer)
        self.n_tiles = self.cache.n_blocks

    def scan(self, only_windows: bool = False) -> _Scan:
        x, q = self.layer, self.queries
        meta = x.meta.at[:, 1].set(x.meta[:, 0]) if only_windows else x.meta
        stats, weights, coarse, acc, window_sums = self.kernels.scan(
            x.index, meta, x.words, q.kernel, x.keys, x.key_scale, x.values, x.values_low, x.value_scale, x.nu, x.live,
            x.windows,
        )  # fmt: skip
        sums = bd.tile_sums(jnp.where(x.active[..., None, None], stats, 0.0), x)
        windows = bd.exact_of(folded(acc), distinct(window_sums, 3))
        return _Scan(sums, weights, folded(coarse.sum(1)), windows)

    def plan(self) -> Plan:
        """What the scan reads values by."""
        x = self.layer
        return Plan(x.words[:, : self.n_tiles], jnp.zeros(len(x.words), bool), x.counts, x.summary)

    def fresh(self, scan: _Scan, judged: bd.Judged) -> Plan:
        """A plan by what came of the one before."""
        summed = bd.summing(self.d, self.additions, bd.TILE + self.n_tiles + 64)
        return choose(
            self.policy, self.batch, self.group, scan.sums, scan.weights, judged, self.queries, self.layer, summed
        )

    def again(self, judged: bd.Judged) -> jax.Array:
        """Heads of rows whose tolerance is not kept: [H] bool."""
        norm, e_total = (self.grouped(x) for x in (judged.norm, judged.e_total))
        nobody = jnp.zeros((self.batch, self.n_heads), bool)
        return self.by_head(heads_to_give_up(self.policy, norm, e_total, nobody).any(1))

    def by_head(self, rows: jax.Array) -> jax.Array:
        """`[b]` -> `[H]`."""
        return jnp.repeat(rows, self.n_heads)

    def values_by_scan(self, scan: _Scan, plan: Plan) -> jax.Array:
        """Of tiles whose values a plan made after the scan reads with its weights: [H, d, G]."""
        counts = plan.counts
        x = self.layer
        found = self.kernels.coarse(x.index, plan.words, counts, scan.weights, x.values, x.values_low)
        some = counts[:, lv.N_COARSE] + counts[:, lv.N_VALUES] > 0
        return jnp.where(some[:, None, None], folded(found.sum(1)), 0.0)

    def fine(self, kernel: Callable, plan: Plan) -> list[jax.Array]:
        """What the kernel finds of what a plan asks for at its finest and, where it has a tolerance, from the host."""
        x = self.layer
        host = (None, None) if self.policy.tolerance is None else (x.host_keys, x.host_values)
        return kernel(
            x.index, plan.words, plan.counts, plan.summary, self.queries.kernel, x.keys, x.keys_low, x.key_scale,
            x.values, x.values_low, x.value_scale, x.nu, *host,
        )  # fmt: skip

    def attempt(self, scan: _Scan, plan: Plan, coarse: jax.Array, fine: list[jax.Array]) -> _Attempt:
        found = self.joined(scan, plan, coarse, fine)
        return _Attempt(plan, self.judge(found, plan), self.consistent(scan, plan, found))

    def joined(self, scan: _Scan, plan: Plan, coarse: jax.Array, fine: list[jax.Array]) -> bd.Pass:
        """All that was read by a plan. Of heads with nothing at its finest the kernels leave anything."""
        (acc, stats, *host), counts = fine, plan.counts
        some = lv.at_work(counts[:, lv.N_FINEST] + counts[:, lv.N_PROMOTED], acc.shape[1])
        refining = jnp.arange(acc.shape[1]) < some[:, None]
        values = coarse + folded(jnp.where(refining[..., None, None], acc, 0.0).sum(1))
        exact = scan.windows
        if host:
            reading = jnp.arange(host[0].shape[1]) < lv.at_work(counts[:, lv.N_PROMOTED, None], host[0].shape[1])
            exact = bd.joined(exact, _found(host, reading))
        level = lv.level_of_rest(plan.words, self.d)
        return bd.Pass(scan.sums, bd.tile_sums(stats, self.layer), level, values, exact)

    def dense(self, heads: jax.Array) -> bd.Exact:
        """Attend to all originals of `heads` `[H]`, and to nothing else."""
        x, q = self.layer, self.queries
        found = self.kernels.originals(
            x.index, x.meta, heads.astype(jnp.int32), q.kernel, x.host_keys, x.host_values, alone=True
        )
        return _found(found, heads[:, None], alone=True)

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
        """No fewer parts of originals than a program read, of windows or pieces: [H, 1]."""
        return lv.n_pieces(plan.summary)[:, None] + lv.PARTS_OF_A_WINDOW

    @property
    def additions(self) -> int:
        return additions_of(self.n_tiles, self.kernels)

    def grouped(self, x):
        """`[H, G, ...]` of the padded group to `[b, Hkv, group, ...]`."""
        return x[:, : self.group].reshape(self.batch, self.n_heads, self.group, *x.shape[2:])

    def finish(self, first: _Attempt, second: tuple[jax.Array, _Attempt] | None, sound: jax.Array):
        """Dense attention for the heads that need it, and the record. `second`: for which heads `[H]`, and what came
        of it."""
        x, counts = self.layer, first.plan.counts
        passes = [Reads(counts, lv.n_pieces(first.plan.summary))]
        judged, passed, gone = first.judged, first.passed, first.plan.give_up
        if second is not None:
            again, other = second

            def either(a, b):  # [H, ...] each
                return jnp.where(again.reshape(-1, *[1] * (a.ndim - 1)), a, b)

            judged, gone = jax.tree.map(either, (other.judged, other.plan.give_up), (judged, gone))
            passed = jnp.where(again.reshape(self.batch, self.n_heads, 1), other.passed, passed)
            passes.append(Reads(either(other.plan.counts, 0), either(lv.n_pieces(other.plan.summary), 0)))
            counts = either(other.plan.counts, counts)
        out, e_total, norm = (self.grouped(x) for x in (judged.out, judged.e_total, judged.norm))
        row_failed = ~(sound & (jnp.isfinite(norm) & passed).all((1, 2)))  # [b]
        gone = gone.reshape(self.batch, -1)
        dense = heads_to_give_up(self.policy, norm, e_total, gone) | row_failed[:, None]  # [b, Hkv]
        found = self.dense(dense.reshape(-1))
        exact, exact_norm, error = bd.judge_dense(
            found, self.queries, self.cache.capacity, per_program_of(self.n_tiles, self.kernels.fewest_dense),
            self.additions,
        )  # fmt: skip
        out = jnp.where(dense[..., None, None], self.grouped(exact), out)
        e_total = jnp.where(dense[..., None], self.grouped(error), e_total)
        norm = jnp.where(dense[..., None], self.grouped(exact_norm), norm)
        return out, certificate(
            self.policy, self.cache, x.live, counts, passes,
            jnp.where(row_failed[:, None], 2, dense.astype(jnp.int32)), sound, passed,
            bounds={name: self.grouped(getattr(judged, name)) for name in BOUNDS},
            candidate_norm=self.grouped(judged.norm), norm=norm, e_total=e_total,
            tail_mass=self.grouped(judged.tail_mass), delta_max=self.grouped(judged.delta_max),
        )  # fmt: skip


def _found(host, some: jax.Array, *, alone: bool = False) -> bd.Exact:
    """Of the heads `[H, 1]`, or their programs `[H, S]`, that read something."""
    acc, sums = host
    some, nothing = some[..., None, None], jnp.array([0.0, 0.0, 0.0, LOWEST])[:, None]
    acc, sums = jnp.where(some, folded(acc), 0.0), jnp.where(some, distinct(sums, 3), nothing)
    return bd.exact_of(acc, sums, alone=alone)


def per_program_of(n_tiles: int, fewest: int) -> int:
    """Most tiles that one of at least so many programs of a head reads, or halves of tiles in the dense pass."""
    return -(-2 * n_tiles // fewest)


def additions_of(n_tiles: int, kernels: Kernels) -> int:
    """Most float32 roundings that a tile's sum goes through on its way into the sum of all."""
    return 2 * (per_program_of(n_tiles, kernels.fewest) + kernels.uneven + kernels.splits) + 64
