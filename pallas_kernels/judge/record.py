"""What judge hands on to plan, itself and dense heads, and the constants of rounding that it takes."""

from __future__ import annotations

import dataclasses

import triton
import triton.language as tl

from pallas_kernels.tile_facts import SLACK

(
    NORM, E_KEY, E_VAL, E_ARITH, E_TOTAL, E_KEY_PAPER, E_VAL_PAPER, DELTA_MAX, TAIL_MASS, PASSED, TOTAL, L_MINUS,
    FROM_CENTRE, NU_MEAN, RETURNED_NORM, RETURNED_BOUND,
) = (tl.constexpr(i) for i in range(16))  # fmt: skip
ROWS = tl.constexpr(16)
"""Of a head's record: what a candidate came to, of which four are for the plan after it; and the norm and the bound of
what is returned, the candidate's or those of dense attention."""

FIRST, AGAIN, OF_ROWS, OF_DENSE = (tl.constexpr(i) for i in range(4))
ARRIVALS = 4
"""Rows of `arrived`, by which programs of a head, or heads of a row, count themselves: those that judge a first and a
second pass, heads that have been judged twice, and programs that read a dense head."""

KEPT, ANEW, REDO = range(3)
"""What comes of a plan: it serves the next step, too; one is made anew for the next step; or for this one, which is
judged once more."""


@triton.jit
def length(square, ROOT: tl.constexpr, VANISHED: tl.constexpr):
    """A norm from its square, rounded up."""
    return tl.sqrt(square) * SLACK + ROOT * VANISHED


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Constants of the arithmetic (docs/kernels.md) that depend on shapes."""

    split: float  # relative error of a sum of values over tiles
    turning: float  # of the rotation back
    depth_gamma: float
    inflate: float
    vanished: float
    highest: float
