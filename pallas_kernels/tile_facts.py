"""What the Triton kernels read of a tile, and what it adds to the bound: the formulas of `certjax.fused.bound`.

Arrays are `[T, C]`, tiles by query heads; `[T]` for what a KV head's tiles have, `[C]` for what its query heads have.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels import numerics as num
from pallas_kernels.device_math import expm1_up, growth_up, least, second_order_up

SLACK = tl.constexpr(num.NORM_SLACK)
FLUSHED = tl.constexpr(128**0.5 * 2.0**-63)
"""Norm of the weights of a tile whose squares may have been flushed to zero."""

LARGEST_STEP, LARGEST_RHO = tl.constexpr(num.LARGEST_STEP), tl.constexpr(num.LARGEST_RHO)

NOTES = ("kappa", "eta", "nu", "sigma_k", "sigma_v", "rho_k", "rho_v")
"""Annotations of tiles, as kernels take them one after the other."""

PEAK_STEP = tl.constexpr((1 + 2.0**-20) / 255)


@triton.jit
def number(pointer, mask):
    """Of bfloat16, 0 where masked out."""
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_sums(stats, row, there, C: tl.constexpr):
    """Of tiles `row` of `stats` [H NT, 4, C], where they are `there`: `sum w`, `sum w share`, `sum w^2`, `sum w s` with
    the values' scales, and the first two again times the keys' scales."""
    of = stats + row[:, None] * (4 * C) + (tl.arange(0, C) % (C // 2))[None]
    mask, keyed = there[:, None], of + C // 2
    return (
        tl.load(of, mask=mask, other=0.0), tl.load(of + C, mask=mask, other=0.0),
        tl.load(of + 2 * C, mask=mask, other=0.0), tl.load(of + 3 * C, mask=mask, other=0.0),
        tl.load(keyed, mask=mask, other=0.0), tl.load(keyed + C, mask=mask, other=0.0),
    )  # fmt: skip


@triton.jit
def tile_sums(loaded, nu_peak, read):
    """`sum w`, `sum w nu`, `sqrt(sum w^2)`, which is no more than the first, and `sum w s` with the values' scales; and
    `sum w s` and `sum w s nu` with the keys': 0 where not `read`."""
    a, n, squares, scaled, keyed, keyed_n = loaded
    read, share = read[:, None], (nu_peak * PEAK_STEP)[:, None]
    a = tl.where(read, a, 0.0)
    norm = least(tl.sqrt(tl.where(read, squares, 0.0)) + FLUSHED, a)
    return (
        a, tl.where(read, n * share, 0.0), norm, tl.where(read, scaled, 0.0), tl.where(read, keyed, 0.0),
        tl.where(read, keyed_n * share, 0.0),
    )  # fmt: skip


@triton.jit
def key_terms(a, n, norm, keyed, keyed_n, q_norm, kappa, sigma_k, rho_k, nu_peak):
    """`(k0, k1, e^Delta - 1, Delta)`, the first two with `k0 + k1 h` at least `L^- W` times what tiles add to E_key."""
    delta = q_norm[None] * (kappa * SLACK)[:, None]
    coefficient = q_norm[None] * (sigma_k * SLACK)[:, None] * norm
    first, second = expm1_up(delta), second_order_up(delta)
    k0, k1 = first * n, first * a
    together = coefficient * nu_peak[:, None] + second * n
    k1 = tl.where(together < k0, coefficient + second * a, k1)
    k0 = least(k0, together)
    step = q_norm[None] * (rho_k * SLACK)[:, None]
    growth = step * growth_up(delta)
    by_scale = tl.where(step < LARGEST_STEP, growth * keyed_n, float("inf"))
    k1 = tl.where(by_scale < k0, growth * keyed, k1)
    return least(k0, by_scale), k1, first, delta


@triton.jit
def linear_value_terms(a, scaled, eta, rho_v):
    """`sum w ||v_t - v^_t||` from above: by the largest residual, or by the largest in units of a token's scale."""
    return least(a * eta, tl.where(rho_v < LARGEST_RHO, scaled * rho_v, float("inf")))


@triton.jit
def folded(x, D: tl.constexpr, C: tl.constexpr):
    """Both halves of the columns of `x` [D, C] (or flat) added up, in each half."""
    x = tl.sum(tl.reshape(x, (D, 2, C // 2)), 1)
    return tl.reshape(tl.broadcast_to(x[:, None], (D, 2, C // 2)), (D, C))
