"""A fixed orthogonal change of basis that spreads what is large in a few channels over all of them.

For `d = m 2^k` with m odd: random signs, a Walsh-Hadamard transform of length `2^k`, and a Hartley transform of
length m. After it the channels of a key or value look alike, so that one scale a token fits them all.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import numerics as num


@functools.cache
def _parts(d: int) -> tuple[int, int]:
    """`d = m 2^k`: (m, k)."""
    k = (d & -d).bit_length() - 1
    return d >> k, k


@functools.cache
def _signs(d: int) -> np.ndarray:
    return np.random.default_rng(d).choice(np.array([-1.0, 1.0], np.float32), d)


@functools.cache
def _hartley(m: int) -> np.ndarray:
    """The symmetric orthogonal matrix `cas(2 pi i j / m) / sqrt(m)`."""
    angle = 2 * np.pi * np.outer(np.arange(m), np.arange(m)) / m
    return ((np.cos(angle) + np.sin(angle)) / np.sqrt(m)).astype(np.float32)


def rotate(x: jax.Array) -> jax.Array:
    """`R x`. `x`: [..., d] float32."""
    return _transform(x * _signs(x.shape[-1]))


def unrotate(y: jax.Array) -> jax.Array:
    """`R^T y`, the inverse of `rotate`. `y`: [..., d] float32."""
    return _transform(y) * _signs(y.shape[-1])


def _transform(x: jax.Array) -> jax.Array:
    """Hadamard times Hartley: symmetric and orthogonal, hence its own inverse."""
    d = x.shape[-1]
    m, k = _parts(d)
    for i in range(k):
        pairs = x.reshape(*x.shape[:-1], d >> (i + 1), 2, 1 << i)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = jnp.stack([a + b, a - b], -2).reshape(x.shape)
    x = x * jnp.float32(2.0 ** (-k / 2))
    if m > 1:
        columns = x.reshape(*x.shape[:-1], m, 1 << k)
        x = jnp.einsum("ij,...jk->...ik", _hartley(m), columns, precision=lax.Precision.HIGHEST).reshape(x.shape)
    return x


def rounding(d: int) -> float:
    """Bound on `||computed - exact|| / ||x||` of a transform.

    A butterfly adds a relative error of u to its result and is orthogonal up to a factor: k of them add up to
    gamma(k), the scaling 2 u. The Hartley matrix has entries within 2 u and Frobenius norm sqrt(m).
    """
    m, k = _parts(d)
    return num.gamma(k + 3) + (m > 1) * m**0.5 * num.gamma(m + 4)
