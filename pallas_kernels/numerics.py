"""Float32 arithmetic with a known worst case: error constants, and sums whose depth is fixed.

The bounds used here are the standard ones of N. J. Higham, *Accuracy and Stability of Numerical
Algorithms*, 2nd ed., ch. 3-4: a sum or dot product of n terms in any order is off by at most
`gamma(n)` times the sum of the absolute values. `docs/bounds.md` says where each constant enters.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

U = 2.0**-24
"""Unit roundoff of float32."""

EXP_RELATIVE_ERROR = 2.0**-16
"""Allowance for `exp(s - m)` as computed: the rounding of `s - m` (|s - m| <= 88 wherever the result
is not flushed to zero, so at most 88 U = 5.3e-6) and the error of the back end's exp itself, for which
10 ulp are left. `tests/test_numerics.py` measures it on the device it runs on."""

MAX_HEAD_DIM = 512
"""Longest vector that the constants below speak of."""

NORM_SLACK = 1.0 + 2.0**-15
"""Covers the rounding of a float32 Euclidean norm of up to MAX_HEAD_DIM terms."""

LARGEST_STEP, LARGEST_RHO = 64.0, 1024.0  # above these, sums of weights times scales are not used (docs/kernels.md)

PRODUCTS = 8
"""That a matrix unit adds up before it rounds, at least: 8 on Ampere and Ada, 16 on Hopper (docs/kernels.md, A5)."""

UNDERFLOW = 2.0**-123
"""Allowance per token for softmax weights and products flushed to zero, before the growth by e^Delta that
the exact weight may have over the computed one (docs/bounds.md, section 5): 8 times the normal range's edge."""

MAX_DELTA = 20.0
"""Score perturbations above this make the exponential bounds useless; the bound then is infinite."""

ABSOLUTE_FLOOR = 2.0**-97
"""Added to every bound: covers whatever products of tiny operands lose to flushing (2^-126 each)."""

CHUNK = 256
"""Target length of the inner level of a two-level sum."""


def gamma(n: int) -> float:
    """Higham's `gamma_n = n u / (1 - n u)` for float32.

    Raises
    ------
    ValueError
        If `n u >= 1/2`, where the bound stops being meaningful.
    """
    if n * U >= 0.5:
        raise ValueError(f"gamma({n}): too many float32 terms for a useful error bound")
    return n * U / (1.0 - n * U)


def chunk_length(n: int) -> int:
    """Largest divisor of `n` that is at most `CHUNK`: the inner length of a two-level sum."""
    return next(c for c in range(min(n, CHUNK), 0, -1) if n % c == 0)


def sum_depth(n: int) -> int:
    """Number of terms a result of `sum_tokens`/`weighted_sum` over `n` tokens passes through."""
    if n == 0:
        return 0
    c = chunk_length(n)
    return c + n // c


def sum_tokens(x: jax.Array) -> jax.Array:
    """Sum over the last axis in two levels. `x`: [..., N] -> [...].

    Every term passes through at most `sum_depth(N)` additions, whatever order the compiler takes inside
    a level; the barrier keeps it from merging the two levels into one.
    """
    n = x.shape[-1]
    c = chunk_length(n)
    partial = lax.optimization_barrier(x.reshape(*x.shape[:-1], n // c, c).sum(-1))
    return partial.sum(-1)


def weighted_sum(w: jax.Array, v: jax.Array) -> jax.Array:
    """`sum_t w_t v_t` in two levels. `w`: [..., G, N], `v`: [..., N, d] -> [..., G, d], float32."""
    *lead, n, d = v.shape
    c = chunk_length(n)
    w = w.reshape(*lead, w.shape[-2], n // c, c)
    v = v.reshape(*lead, n // c, c, d)
    partial = jnp.einsum("...gsc,...scd->...sgd", w, v, precision=lax.Precision.HIGHEST)
    return lax.optimization_barrier(partial).sum(-3)


def dot_scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """`q.k / sqrt(d)` in float32. `q`: [..., G, d], `k`: [..., N, d] -> [..., G, N].

    Off from real arithmetic by at most `gamma(d + 4) ||q|| ||k|| / sqrt(d)`: d products and additions,
    one scaling, and the rounding of 1/sqrt(d) itself.
    """
    d = q.shape[-1]
    # Keys on the left: the product XLA's CPU back end is faster at.
    s = jnp.einsum("...nd,...gd->...ng", k, q, precision=lax.Precision.HIGHEST)
    return s.swapaxes(-1, -2) * jnp.float32(d**-0.5)


def score_error(d: int, q_norm: jax.Array, k_norm: jax.Array, turned: float = 0.0) -> jax.Array:
    """Bound on the rounding of `dot_scores` for vectors of at most these norms, one of which was computed with a
    relative error of `turned`.

    The floor of the norms covers products of tiny elements, which may be flushed to zero.
    """
    floor = 2.0**-100
    product = jnp.maximum(q_norm, floor) * jnp.maximum(k_norm, floor)
    return (gamma(d + 4) + 2 * turned) * d**-0.5 * NORM_SLACK * product


def norm_up(x: jax.Array) -> jax.Array:
    """Euclidean norm over the last axis, never below the true one while that is normal.

    `x`: [..., d] float32, d <= MAX_HEAD_DIM, -> [...] float32. NaN and infinities propagate. What elements
    below 2^-100 lose to flushing is covered by ABSOLUTE_FLOOR.
    """
    m = jnp.abs(x).max(-1, keepdims=True)
    # Neither m nor 1/m may be subnormal: some compilers divide by multiplying with the reciprocal.
    m = jnp.where(m > 0, jnp.clip(m, 2.0**-100, 2.0**100), m)
    scaled = x / jnp.where(m > 0, m, 1.0)
    return (m * jnp.sqrt((scaled * scaled).sum(-1, keepdims=True)) * NORM_SLACK)[..., 0]


def spectral_norm_up(r: jax.Array) -> jax.Array:
    """Largest singular value of each matrix, never below the true one and at most 3% above it for 16 rows.

    `r`: [..., B, d] float32 -> [...]. With `lambda` the largest eigenvalue of the Gram matrix and `N_0` that matrix
    divided by its Frobenius norm, five squarings `N <- N N^T` make `lambda <= f_0 sqrt(f_1 sqrt(f_2 ...))` of the
    Frobenius norms `f` met on the way sharp to a factor `B^(1/64)`. Rounding: docs/bounds.md, section 2.
    """
    rows, d = r.shape[-2:]
    m = jnp.abs(r).max((-2, -1), keepdims=True)
    m = jnp.where(m > 0, jnp.clip(m, 2.0**-100, 2.0**100), 1.0)
    a, norms = r / m, []
    for _ in range(6):
        a = jnp.einsum("...id,...jd->...ij", a, a, precision=lax.Precision.HIGHEST)
        f = jnp.sqrt((a * a).sum((-2, -1), keepdims=True))
        norms.append(f[..., 0, 0])
        a = a / jnp.where(f > 0, f, 1.0)
    bound = norms.pop()
    while norms:
        bound = norms.pop() * jnp.sqrt(bound)
    slack = 1 + rows * (gamma(d) + 2 * gamma(rows)) + 2.0**-12
    bound = m[..., 0, 0] * jnp.sqrt(bound) * slack
    return jnp.where(jnp.isnan(bound), jnp.inf, bound)


def normal_or_zero(x: jax.Array) -> jax.Array:
    """`x` (x >= 0), with 0 for what is below float32's normal range: dividing by it would overflow, and some devices
    flush it. A quantizer's step of 0 leaves the offset alone to carry the data."""
    return jnp.where(x.astype(jnp.float32) < jnp.finfo(jnp.float32).tiny, jnp.zeros_like(x), x)


def representable(x: jax.Array, dtype) -> jax.Array:
    """`x` (float32) rounded to the nearest number that `dtype` holds, still in float32.

    A cast to `dtype` of the result is exact. That matters because XLA may drop a cast to a narrow type and
    back (`xla_allow_excess_precision`, on by default): what was measured on a value that never was rounded would
    not hold for the value that was stored.
    """
    dtype, info = jnp.dtype(dtype), jnp.finfo(dtype)
    if info.nmant >= jnp.finfo(jnp.float32).nmant:  # float32 or wider: holds every float32
        return x
    rounded = lax.reduce_precision(x, info.nexp, info.nmant)
    if dtype != jnp.float16:  # bfloat16 shares float32's exponents, and its subnormals with float32
        return rounded
    # reduce_precision may flush float16's subnormals, which are multiples of 2^-24.
    return jnp.where(jnp.abs(x) < float(info.smallest_normal), jnp.round(x * 2.0**24) * 2.0**-24, rounded)


def cast(x: jax.Array, dtype) -> jax.Array:
    """`x` in `dtype`, by way of `representable`."""
    return representable(x.astype(jnp.float32), dtype).astype(dtype)


def exponent_above(x: jax.Array) -> jax.Array:
    """The least k with `x < 2^k`, int32. From the bits: logarithms and exponentials are not exact. `x`: positive and
    normal."""
    return (lax.bitcast_convert_type(x, jnp.int32) >> 23) - 126


def power_of_two(k: jax.Array) -> jax.Array:
    """`2^k` exactly, float32. `k`: int32 in [-126, 127]."""
    return lax.bitcast_convert_type((k + 127) << 23, jnp.float32)


def round_up_bf16(x: jax.Array) -> jax.Array:
    """Smallest bfloat16 that is at least `x` (float32, x >= 0, or inf/NaN).

    bfloat16 rather than float16: an annotation must not overflow (the norm of float16 values reaches
    65504 sqrt(d)) nor vanish (residuals of subnormal inputs), and its 2^-8 relative step costs little.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    up = (bits + jnp.uint32(0xFFFF)) & jnp.uint32(0xFFFF0000)
    # inf and NaN would be carried into other bit patterns by the addition: they pass unchanged.
    up = jnp.where(jnp.isfinite(x), up, bits)
    return lax.bitcast_convert_type(up, jnp.float32).astype(jnp.bfloat16)
