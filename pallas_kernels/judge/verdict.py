"""Who goes dense, and what is returned.

Twins: `certjax.fused.ladder.heads_to_give_up`, `certjax.fused.bound.judge_dense`.
"""

from __future__ import annotations

import jax
import triton
import triton.language as tl

from pallas_kernels import levels as lv
from pallas_kernels import numerics as num
from pallas_kernels.device_math import MAX_DELTA, exp_up, expm1_up, least, most, no_nan
from pallas_kernels.judge import record as rc
from pallas_kernels.judge.contract import checks_failed
from pallas_kernels.judge.record import (
    E_TOTAL,
    NORM,
    PASSED,
    RETURNED_BOUND,
    RETURNED_NORM,
    ROWS,
    Rounding,
    length,
)
from pallas_kernels.launch import launch
from pallas_kernels.tile_facts import SLACK, folded

REDO = tl.constexpr(rc.REDO)
COUNTS, GIVE_UP = tl.constexpr(lv.COUNTS), tl.constexpr(lv.GIVE_UP)
U, UNDERFLOW, FLOOR = tl.constexpr(num.U), tl.constexpr(num.UNDERFLOW), tl.constexpr(num.ABSOLUTE_FLOOR)


@triton.jit
def decide_row(
    batch,
    record, counts, sound,  # inputs
    dense,  # output
    HEADS: tl.constexpr, HEADS_UP: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, RELATIVE_TO: tl.constexpr,
    TOLERANCE: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """Of the KV heads of a row that a second pass was asked for: 0 returned as it is, 1 dense, 2 dense because the row
    failed a check."""
    head, col = tl.arange(0, HEADS_UP), tl.arange(0, C)
    real = head < HEADS
    shown = real[:, None] & (col < GROUP)[None]
    of = record + (batch * HEADS + head[:, None]) * ROWS * C + col[None]
    norm = tl.load(of + NORM * C, mask=shown, other=0.0)
    own = no_nan(tl.load(of + E_TOTAL * C, mask=shown, other=0.0))
    passed = tl.load(of + PASSED * C, mask=shown, other=1.0)
    gone = tl.load(counts + (batch * HEADS + head) * COUNTS + GIVE_UP, mask=real, other=0) > 0
    failed = checks_failed(norm, passed, tl.load(sound + batch)) > 0
    own = tl.where(gone[:, None] & shown, float("inf"), own)
    if RELATIVE_TO == "layer":
        # In units of the longest output, so that no square overflows or vanishes.
        unit = 1 / least(most(tl.max(tl.max(norm, 1), 0), 2.0**-100), 2.0**100)
        own, norm = own * unit, norm * unit
        worst = tl.max(own, 1)
        squares = tl.sum(norm * norm, 1)
        bounds = tl.sum(own * own, 1) if POOLED else worst * worst
        ahead = worst[None] > worst[:, None]
        ahead |= (worst[None] == worst[:, None]) & (head[None] < head[:, None])
        rank = tl.sum((ahead & real[None]).to(tl.int32), 1)  # 0: the largest bound
        n = tl.arange(0, 2 * HEADS_UP)[:, None]
        stays = (rank[None] >= n) & real[None]  # [n, head]: with the n worst dense
        kept = tl.sum(tl.where(stays, squares[None], 0.0), 1)
        left = tl.where(stays, bounds[None], 0.0)
        left = tl.sum(left, 1) if POOLED else tl.max(left, 1) * (GROUP * HEADS)
        # A little is held back for the rounding of the sums, which `allotted` evaluates in another order.
        nobody = tl.sum(stays.to(tl.int32), 1) == 0
        fits = ((left <= (TOLERANCE * TOLERANCE * (1 - 2.0**-14)) * kept) & (kept < float("inf"))) | nobody
        first = tl.min(tl.where(fits, tl.arange(0, 2 * HEADS_UP), 2 * HEADS_UP), 0)
        goes = gone | (rank < first)
    else:
        if RELATIVE_TO == "head":
            allowed = tl.where(tl.abs(norm) < float("inf"), TOLERANCE * norm, 0.0)
        else:
            allowed = tl.full((HEADS_UP, C), TOLERANCE, tl.float32)
        goes = gone | (tl.sum((~(own <= allowed) & shown).to(tl.int32), 1) > 0)
    verdict = tl.where(failed, 2, goes.to(tl.int32))
    tl.store(dense + batch * HEADS + head, verdict, mask=real)


@triton.jit
def _finish(
    dense, asked, acc, sums, facts, out_before, record_before,  # inputs
    out, record, revised,  # outputs
    S: tl.constexpr, S_UP: tl.constexpr, AT_ONCE: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr,
    D: tl.constexpr, ROOT: tl.constexpr, VANISHED: tl.constexpr, SPLIT: tl.constexpr, DEPTH_GAMMA: tl.constexpr,
    READS: tl.constexpr, EXP_RELATIVE_ERROR: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The output of dense attention, its norm and its bound, in place of the candidate's."""
    h = tl.program_id(0)
    col, channel = tl.arange(0, C), tl.arange(0, D)
    goes = tl.load(dense + h) > 0
    tl.store(revised + h, (goes | (tl.load(asked + h) == REDO)).to(tl.int32))
    if goes:
        part, all_parts = tl.arange(0, AT_ONCE)[:, None], tl.arange(0, S_UP)[:, None]
        of = sums + (h * S + all_parts) * (4 * C) + col[None]
        here = all_parts < S
        peaks = tl.load(of + 3 * C, mask=here, other=-1e30)
        peak = tl.max(peaks, 0)
        total = tl.sum(tl.load(of, mask=here, other=0.0) * tl.exp2(peaks - peak[None]), 0)
        key = tl.max(tl.load(of + C, mask=here, other=0.0), 0)
        value = tl.max(tl.load(of + 2 * C, mask=here, other=0.0), 0)
        flat, exact = tl.arange(0, D * C)[None], tl.zeros((D * C,), tl.float32)
        of_flat = sums + h * S * 4 * C + flat % C
        peak_flat = tl.full((1, D * C), -1e30, tl.float32)
        for start in tl.static_range(0, S, AT_ONCE):
            at = start + part
            peaks_flat = tl.load(of_flat + at * (4 * C) + 3 * C, mask=at < S, other=-1e30)
            peak_flat = most(peak_flat, tl.max(peaks_flat, 0)[None])
        for start in tl.static_range(0, S, AT_ONCE):
            at = start + part
            scale = tl.exp2(tl.load(of_flat + at * (4 * C) + 3 * C, mask=at < S, other=-1e30) - peak_flat)
            exact += tl.sum(tl.load(acc + (h * S + at) * (D * C) + flat, mask=at < S, other=0.0) * scale, 0)
        exact = folded(exact, D, C)
        key, value = length(key, ROOT, VANISHED), length(value, ROOT, VANISHED)
        of = facts + h * 4 * C + col
        eps = 32 * U * (tl.load(of) * key) + EXP_RELATIVE_ERROR + READS * 2.0**-21
        eps += tl.load(of + 2 * C) * key * SLACK
        result = exact / total[None]
        accumulated = (SPLIT + 3 * DEPTH_GAMMA) * value
        norm = length(tl.sum(result * result, 0), ROOT, VANISHED)
        radius = value + norm + accumulated
        grow = exp_up(least(eps, MAX_DELTA))
        error = (grow * expm1_up(eps) + N * UNDERFLOW / total * grow * grow) * radius + accumulated
        error = least(tl.where(eps < MAX_DELTA, no_nan(error), float("inf")), no_nan(value + norm))
        error = error * (1 + 2.0**-12) + FLOOR
        tl.store(out + (h * GROUP + col[None]) * D + channel[:, None], result, mask=(col < GROUP)[None])
        of = record + h * ROWS * C + col
        tl.store(of + RETURNED_NORM * C, norm)
        tl.store(of + RETURNED_BOUND * C, error)


def finish(
    dense: jax.Array,  # [H] int32
    asked: jax.Array,  # [H] int32
    found: tuple[jax.Array, jax.Array],  # [H, S, d, C], [H, S, 4, C], of heads that are dense
    facts: jax.Array,
    out: jax.Array,  # [H, group, d]
    record: jax.Array,  # [H, ROWS, C]
    rounding: Rounding,
    *,
    capacity: int,
    reads: int,
) -> list[jax.Array]:
    """`out` and `record`, where a head is dense of that; and whether its output is another than was judged first, by a
    second pass or this, `[H]` int32. `reads`: halves of tiles that a program of the dense pass reads at most."""
    heads, splits, d, columns = found[0].shape
    return launch(
        _finish, dense, asked, *found, facts, out, record,
        out=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (out, record, asked)], in_place={5: 0, 6: 1},
        grid=(heads,), S=splits, S_UP=triton.next_power_of_2(splits),
        AT_ONCE=min(8, triton.next_power_of_2(splits)), GROUP=out.shape[1], C=columns, D=d, ROOT=d**0.5,
        VANISHED=rounding.vanished, SPLIT=rounding.split, DEPTH_GAMMA=rounding.depth_gamma, READS=reads,
        EXP_RELATIVE_ERROR=num.EXP_RELATIVE_ERROR, N=float(capacity),
    )  # fmt: skip
