"""One certified decode step in four kernels: scan, attend, promote, dense per head.

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
from certjax.fused.ladder import allotted, heads_to_give_up
from certjax.fused.plan import Plan, choose
from certjax.policy import Policy
from pallas_kernels.dispatch import Kernels
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
    judged = step.judge(found)
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
    found = step.attend(step.scan(only_windows=True), step.everything(), promote=False)
    return step.judge(found).out[:, : q.shape[2]].reshape(q.shape)


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
        return Plan(jnp.where(active, bd.FINEST, bd.SKIP), jnp.zeros_like(active[:, 0]))

    def plan(self, scan: _Scan) -> Plan:
        if self.policy.tolerance is None:
            return self.everything()
        summed = bd.summing(self.d, self.additions, bd.TILE + self.n_tiles + 64)
        return choose(self.policy, self.batch, self.group, scan.sums, scan.windows, self.queries, self.layer, summed)

    def attend(self, scan: _Scan, plan: Plan, *, promote: bool) -> bd.Pass:
        """Read what a plan asks for; without `promote` it asks for nothing of tier 2."""
        x, q = self.layer, self.queries
        counts = jnp.stack([(plan.level == i).sum(1) for i in range(5)], 1).astype(jnp.int32)
        acc, stats, *host = self.kernels.attend(
            x.index, x.meta, plan.level, counts, scan.weights, q.kernel, x.keys, x.keys_low, x.key_scale, x.values,
            x.values_low, x.value_scale, x.nu, *((x.host_keys, x.host_values) if promote else (None, None)),
        )  # fmt: skip
        exact = scan.windows
        if promote:
            exact = bd.joined(exact, _found(host, counts[:, bd.PROMOTE] > 0))
        return bd.Pass(scan.sums, bd.tile_sums(stats, x), plan.level, folded(acc.sum(1)), exact)

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
        """Canary: promoted tiles weigh by their originals what they weigh by tier 1, within its bound: [b, Hkv, G]."""
        if not self.policy.canary or self.policy.tolerance is None:
            return jnp.ones((self.batch, self.n_heads, self.group), bool)
        q = self.queries
        delta = bd.delta_of(q, self.layer.kappa_peak[..., 0])
        delta = jnp.minimum(delta, 80.0)
        a = jnp.where((plan.level == bd.PROMOTE)[..., None], scan.sums.a, 0.0)
        high, low = rd.sums(1, a * jnp.exp(delta), a * jnp.exp(-delta))
        original = bd.eps_of_originals(q, found.exact.key, self.rises(plan.level), q.reference)
        slack = jnp.exp(q.eps + original + 2.0**-12)
        exact = found.exact.total - scan.windows.total
        rounding = 2.0**-18 * found.exact.total + 2.0**-100  # of the difference; of what was flushed
        # What is not a number is not an alarm: it fails as such.
        return self.grouped(~((exact > high * slack + rounding) | (exact < low / slack - rounding)))

    def judge(self, found: bd.Pass) -> bd.Judged:
        return bd.judge(found, self.queries, self.layer, self.rises(found.level), self.additions)

    @property
    def per_program(self) -> int:
        return per_program_of(self.n_tiles, self.kernels)

    def rises(self, level: jax.Array) -> jax.Array:
        """Most originals that a program read, of windows or promoted: [H, 1]."""
        return jnp.minimum((level == bd.PROMOTE).sum(1, keepdims=True), self.per_program) + 1

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
        return out, self.record(judged, plan, passed, dense, row_failed, sound, norm, e_total)

    def record(self, judged, plan, passed, dense, row_failed, sound, norm, e_total) -> Certificate:
        shape = e_total.shape
        dense = jnp.broadcast_to(dense[..., None], shape)
        candidate = {name: self.grouped(getattr(judged, name)) for name in _BOUNDS}
        returned = {name: jnp.where(dense, 0.0, x) for name, x in candidate.items()}
        returned["e_total"] = e_total
        returned["e_arith"] = jnp.where(dense, e_total, candidate["e_arith"])
        x = self.layer
        counts = [
            jnp.broadcast_to(n.reshape(self.batch, -1, 1), shape)
            for n in rd.sums(1, x.active, *(plan.level == i for i in (bd.COARSE, bd.FINEST, bd.PROMOTE)))
        ]
        n_active, n_coarse, n_finest, n_promoted = (n.astype(jnp.int32) for n in counts)
        rung = jnp.where(dense, jnp.where(row_failed[:, None, None], 4, 3), jnp.where(n_promoted > 0, 2, 0))
        ok = jnp.ones(shape, bool)
        first = jnp.arange(self.group) == 0
        windows = sum(x.live[:, i] for i in range(x.live.shape[1])).astype(jnp.float32) * (4 * self.d)
        tier1 = sum(n * bytes_of_a_tile(self.d, i) for i, n in enumerate(counts[:3]))
        length = self.cache.length[:, None, None].astype(jnp.float32)
        paged = (jnp.where(dense, length, 0.0) + counts[3] * ops.TILE) * (4.0 * self.d)
        return Certificate(
            **returned,
            **{f"{name}_candidate": x for name, x in candidate.items()},
            out_norm=norm,
            out_norm_candidate=self.grouped(judged.norm),
            tolerance=allotted(self.policy, norm, jnp.where(dense, 0.0, e_total)),
            tail_mass=self.grouped(judged.tail_mass),
            delta_max=self.grouped(judged.delta_max),
            k_star=n_promoted,
            n_value_promoted=n_promoted,
            n_key_refined=n_finest,
            n_value_refined=n_finest,
            n_value_skipped=n_active - n_coarse - n_finest - n_promoted,
            rung=rung.astype(jnp.int32),
            ranking_ok=ok,
            boundary_ok=ok,
            canary_ok=passed,
            precondition_ok=ok & sound[:, None, None] & jnp.isfinite(self.grouped(judged.norm)),
            bytes_read=jnp.where(first, tier1 + windows.reshape(self.batch, -1, 1), 0.0),
            bytes_paged_in=jnp.where(first, paged, 0.0),
        )


def _found(host, some: jax.Array, *, alone: bool = False) -> bd.Exact:
    """Of the heads `[H]` that something was read of."""
    acc, sums = host
    some, nothing = some[:, None, None, None], jnp.array([0.0, 0.0, 0.0, LOWEST])[:, None]
    acc, sums = jnp.where(some, folded(acc), 0.0), jnp.where(some, distinct(sums, 3), nothing)
    return bd.exact_of(acc, sums, alone=alone)


_BOUNDS = ("e_key", "e_val", "e_arith", "e_total", "e_key_paper", "e_val_paper")


def per_program_of(n_tiles: int, kernels: Kernels) -> int:
    """Most tiles, or halves of tiles, that a program reads."""
    return -(-2 * n_tiles // kernels.fewest)


def additions_of(n_tiles: int, kernels: Kernels) -> int:
    """Most float32 roundings that a tile's sum goes through on its way into the sum of all."""
    return 2 * per_program_of(n_tiles, kernels) + 2 * kernels.splits + 64


def bytes_of_a_tile(d: int, level: int) -> float:
    """Of a tile: what the scan (level 0) reads and writes, and what the second pass reads at a level."""
    weights = 8 * 2  # of a token, for a group of up to 4 query heads
    return (
        float(ops.TILE * (d + 5 + weights) + 30),  # 8-bit keys, both scales, nu; the plan's annotations of the tile
        float(ops.TILE * (d // 2 + weights)),  # 4-bit values
        float(ops.TILE * (d + d // 2 + d // 2 + d // 4 + 5)),  # 12-bit keys and 6-bit values, their scales and nu
    )[level]
