"""One pass of softmax attention over tier 1 and the windows, with the certificate's sums as by-products.

The `jnp` twin of the fused kernels: it reads like the formulas of docs/bounds.md, section 4.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from pallas_kernels import numerics as num


@struct.dataclass
class Sums:
    """What the certificate needs of an attend pass. Every leaf `[b, Hkv, G]`, with `p'` the weights used."""

    l_minus: jax.Array  # L- = sum p' e^-Delta
    e_val: jax.Array  # sum p' eta
    grown: jax.Array  # sum p' (e^Delta - 1)
    grown_nu: jax.Array  # sum p' (e^Delta - 1) nu
    nu_mean: jax.Array  # sum p' nu


@struct.dataclass
class Attended:
    """Result of a pass."""

    out: jax.Array  # [b, Hkv, G, d]
    p: jax.Array  # [b, Hkv, G, NB, B] normalised weights of tier-1 tokens
    sums: Sums


@struct.dataclass
class Weights:
    """Softmax numerators before normalisation."""

    tier1: jax.Array  # [b, Hkv, G, NB, B]
    window: jax.Array  # [b, Hkv, G, Nw]
    total: jax.Array  # [b, Hkv, G]


def softmax_weights(scores: jax.Array, window_scores: jax.Array) -> Weights:
    """`exp(s - max s)` over both segments. `scores`: [b, Hkv, G, NB, B], `window_scores`: [b, Hkv, G, Nw]."""
    peak = jnp.maximum(scores.max((-2, -1)), window_scores.max(-1))
    # Barriers: every sum below is over the same numerators, computed once.
    w1, ww = lax.optimization_barrier(
        (jnp.exp(scores - peak[..., None, None]), jnp.exp(window_scores - peak[..., None]))
    )
    total = num.sum_tokens(_flat(w1)) + num.sum_tokens(ww)
    return Weights(tier1=w1, window=ww, total=total)


def attend_reference(
    w: Weights,
    delta: jax.Array,  # [b, Hkv, G, NB, B] Delta_t, 0 where the score is exact
    eta: jax.Array,  # [b, Hkv, G, NB, B] eta_t, 0 where the original value is used
    nu: jax.Array,  # [b, Hkv, NB, B]
    window_nu: jax.Array,  # [b, Hkv, Nw]
    y: jax.Array,  # [b, Hkv, N, d] float32, decoded values in the codec's basis
    window_values: jax.Array,  # [b, Hkv, Nw, d] float32
    from_basis: Callable[[jax.Array], jax.Array] | None = None,  # None: y is in the originals' basis
    centre: jax.Array | None = None,  # [b, Hkv, d] added where `relative`
    relative: jax.Array | None = None,  # [b, Hkv, NB] bool
    quantized: jax.Array | None = None,  # [b, Hkv, G, NB] blocks whose v^ is used; None is all
    promoted_values: jax.Array | None = None,  # [b, Hkv, G, d] sum of w v over the other blocks
) -> Attended:
    """`out = sum p' v^` with `v^ = R^T y + c`, and the sums of docs/bounds.md."""
    p = w.tier1 / w.total[..., None, None]
    pw = w.window / w.total[..., None]

    w1 = w.tier1 if quantized is None else jnp.where(quantized[..., None], w.tier1, 0.0)
    acc = num.weighted_sum(_flat(w1), y)
    acc = acc if from_basis is None else from_basis(acc)
    if centre is not None:
        share = num.sum_tokens(_flat(jnp.where(relative[:, :, None, :, None], w1, 0.0)))
        acc = acc + share[..., None] * centre[:, :, None]
    acc = acc + num.weighted_sum(w.window, window_values)
    if promoted_values is not None:
        acc = acc + promoted_values

    grown = p * jnp.expm1(delta)
    nu, window_nu = nu[:, :, None], window_nu[:, :, None]
    sums = Sums(
        l_minus=num.sum_tokens(_flat(p * jnp.exp(-delta))) + num.sum_tokens(pw),
        e_val=num.sum_tokens(_flat(p * eta)),
        grown=num.sum_tokens(_flat(grown)),
        grown_nu=num.sum_tokens(_flat(grown * nu)),
        nu_mean=num.sum_tokens(_flat(p * nu)) + num.sum_tokens(pw * window_nu),
    )
    return Attended(out=acc / w.total[..., None], p=p, sums=sums)


def block_log_mass(scores: jax.Array) -> jax.Array:
    """`l_b = logsumexp_t s_t` of each block: [..., NB, B] -> [..., NB]."""
    return jax.nn.logsumexp(scores, axis=-1)


def accumulation_depth(n_tier1: int, n_window: int, n_blocks: int, block_size: int, promoted: bool) -> int:
    """Most additions a term of any sum of this pass goes through (the constant of gamma in E_arith)."""
    paged = n_blocks + block_size if promoted else 0  # promoted values are added block by block
    return max(num.sum_depth(n_tier1), num.sum_depth(n_window), paged) + 2


def _flat(x: jax.Array) -> jax.Array:
    return lax.collapse(x, x.ndim - 2)
