"""What judge hands on to decide and finish, and the constants of rounding that all three take."""

from __future__ import annotations

import dataclasses

import triton
import triton.language as tl

from pallas_kernels.tile_facts import SLACK

NORM, E_KEY, E_VAL, E_ARITH, E_TOTAL, E_KEY_PAPER, E_VAL_PAPER, DELTA_MAX, TAIL_MASS, PASSED = range(10)
ROWS = tl.constexpr(10)
"""Of a head's record."""


@triton.jit
def length(square, ROOT: tl.constexpr, VANISHED: tl.constexpr):
    """A norm from its square, rounded up."""
    return tl.sqrt(square) * SLACK + ROOT * VANISHED


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Constants of the arithmetic (docs/kernels.md) that depend on shapes."""

    reads: int  # originals, pieces or halves of tiles, that a program reads at most
    split: float  # relative error of a sum of values over tiles
    turning: float  # of the rotation back
    depth_gamma: float
    inflate: float
    vanished: float
    highest: float
