"""Who goes dense. Twin: `certjax.fused.ladder.heads_to_give_up`."""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels import levels as lv
from pallas_kernels.device_math import least, most, no_nan
from pallas_kernels.judge.contract import checks_failed
from pallas_kernels.judge.record import E_TOTAL, NORM, PASSED, ROWS

COUNTS, GIVE_UP = tl.constexpr(lv.COUNTS), tl.constexpr(lv.GIVE_UP)


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
