"""Whether a row of candidates keeps its tolerance. Twin: where `certjax.fused.ladder.heads_to_give_up` names nobody."""

from __future__ import annotations

import dataclasses

import triton
import triton.language as tl

from pallas_kernels.device_math import least, most, no_nan


@dataclasses.dataclass(frozen=True)
class Contract:
    """Of a policy and a shape."""

    heads: int  # KV heads of a sequence
    group: int  # query heads of each
    relative_to: str
    tolerance: float
    pooled: bool

    @property
    def constants(self) -> dict:
        """What the kernels of `judge` and `plan` take."""
        return dict(
            HEADS=self.heads, HEADS_UP=triton.next_power_of_2(self.heads), RELATIVE_TO=self.relative_to,
            TOLERANCE=self.tolerance, POOLED=self.pooled,
        )  # fmt: skip


@triton.jit
def checks_failed(norm, passed, sound):
    """Whether a row failed a check, of its heads' `[heads, C]` or of its originals: 1 or 0."""
    fine = (tl.abs(norm) < float("inf")) & (passed > 0)  # NaN is not less
    return ((tl.sum(tl.sum((~fine).to(tl.int32), 1), 0) > 0) | (sound.to(tl.int32) == 0)).to(tl.int32)


@triton.jit
def fits_as_it_is(norm, own, shown, TOLERANCE: tl.constexpr, RELATIVE_TO: tl.constexpr, POOLED: tl.constexpr,
                  SHARES: tl.constexpr):  # fmt: skip
    """Whether a row keeps its tolerance, `[heads, C]`: then nobody goes dense, for whom `decide_row` is not asked."""
    own = tl.where(shown, no_nan(own), 0.0)
    if RELATIVE_TO == "layer":
        # In units of the longest output, so that no square overflows or vanishes.
        unit = 1 / least(most(tl.max(tl.max(norm, 1), 0), 2.0**-100), 2.0**100)
        own, norm = own * unit, norm * unit
        squares = tl.sum(tl.sum(norm * norm, 1), 0)
        bounds = tl.sum(tl.sum(own * own, 1), 0)
        if not POOLED:
            worst = tl.max(tl.max(own, 1), 0)
            bounds = worst * worst * SHARES
        fits = (bounds <= (TOLERANCE * TOLERANCE * (1 - 2.0**-14)) * squares) & (squares < float("inf"))
    else:
        if RELATIVE_TO == "head":
            allowed = tl.where(tl.abs(norm) < float("inf"), TOLERANCE * norm, 0.0)
        else:
            allowed = tl.full(norm.shape, TOLERANCE, tl.float32)
        fits = tl.sum(tl.sum((~(own <= allowed) & shown).to(tl.int32), 1), 0) == 0
    return fits
