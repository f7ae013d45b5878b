"""Arithmetic that the Triton kernels share. What ends in `_up` is never below the exact value, with the approximate
exponential of the device (within `2^-22`, and the rounding of its argument) allowed for."""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels import numerics as num

MAX_DELTA = tl.constexpr(num.MAX_DELTA)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
EVERY_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def least(a, b):
    return tl.minimum(a, b, propagate_nan=EVERY_NAN)


@triton.jit
def most(a, b):
    return tl.maximum(a, b, propagate_nan=EVERY_NAN)


@triton.jit
def no_nan(x):
    """Infinity for what is not a number."""
    return tl.where(x != x, float("inf"), x)


@triton.jit
def exponent_above(x):
    """As `numerics.exponent_above`."""
    return (x.to(tl.int32, bitcast=True) >> 23) - 126


@triton.jit
def power_of_two(k):
    """As `numerics.power_of_two`."""
    return ((k + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def rounded(x):
    """To 8 bits: exact as an operand of `product`. (Triton's interpreter cuts off.)"""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        return tl.where(tl.abs(x) < float("inf"), nearest, x)
    else:
        return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def add_product(acc, a, b):
    """`acc + a @ b`, of matrices that hold numbers of at most 8 bits, exact but for the accumulation. (Triton's
    interpreter multiplies bfloat16 wrongly.)"""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)


@triton.jit
def product(a, b):
    """As `add_product`, to nothing."""
    return add_product(tl.zeros((a.shape[0], b.shape[1]), tl.float32), a, b)


@triton.jit
def add(product, x):
    """`product + x`, of which Triton would otherwise make a product that is accumulated on top of `x`, by a matrix unit
    that cuts off what it adds to a large number."""
    return tl.fma(product, tl.full(product.shape, 1.0, tl.float32), x)


@triton.jit
def nearest(x):
    """The integer closest to `x`, `|x| < 2^22`, ties to even."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def exp_up(x):
    """`e^x`, `|x| <= 80`, at most `2^-15` above."""
    return tl.exp(x) * (1 + 2.0**-16)


@triton.jit
def exp_down(x):
    """`e^x`, `-80 <= x <= 0`, at most `2^-15` below."""
    return tl.exp(x) * (1 - 2.0**-16)


@triton.jit
def expm1_up(x):
    """`e^x - 1`, `x >= 0`, finite beyond MAX_DELTA: Taylor's polynomial and its largest remainder up to 1/2."""
    small = x * (1 / 120 + x * (1.65 / 720))
    small = x * (1 + x * (0.5 + x * (1 / 6 + x * (1 / 24 + small)))) * (1 + 2.0**-18)
    return tl.where(x < 0.5, small, tl.exp(least(x, MAX_DELTA)) * (1 + 2.0**-16) - 1)


@triton.jit
def second_order_up(x):
    """`e^x - 1 - x`, `x >= 0`, as `bounds.spectral.second_order`."""
    small = 0.5 * x * x * exp_up(0.5 * least(x, 0.5))
    return tl.where(x < 0.5, small, (expm1_up(x) - least(x, MAX_DELTA)) * (1 + 2.0**-14))


@triton.jit
def growth_up(x):
    """`(e^x - 1) / x`, `x >= 0`, as `certjax.fused.bound.growth_up`; finite beyond MAX_DELTA."""
    x = least(x, MAX_DELTA)
    return exp_up(x * (0.5 + x * (1 / 24)))


@triton.jit
def is_last(arrived, N: tl.constexpr):
    """Whether this is the last of N programs to count itself in `arrived`: it sees what the others have stored."""
    tl.debug_barrier()  # of this program, all threads have
    return tl.atomic_add(arrived, 1, sem="acq_rel") == N - 1
