"""How far a score computed with tier-1 keys can be from the score of the originals."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from certjax.codecs import Codec
from certjax.codecs.base import Codes
from pallas_kernels import numerics as num


def score_delta(q: jax.Array, codec: Codec, codes: Codes, kappa: jax.Array) -> jax.Array:
    """`Delta_t = min(||q|| kappa_t, codec's channel bound) / sqrt(d)`.

    `q`: [b, Hkv, G, d], `kappa`: [b, Hkv, NB, B] float32; returns `[b, Hkv, G, NB, B]`.
    """
    q_norm = num.norm_up(q)[..., None, None]
    delta = q_norm * kappa[:, :, None]
    by_channel = codec.channel_bound(jnp.abs(q), codes)
    if by_channel is not None:
        delta = jnp.minimum(delta, by_channel[..., None])
    return delta * (q.shape[-1] ** -0.5 * num.NORM_SLACK)


def paper_delta(q: jax.Array, codec: Codec, codes: Codes, delta: jax.Array) -> jax.Array:
    """The paper's `Delta_b = ||q|| ||sigma_b|| / (2 sqrt d)`; the measured block maximum for codecs without
    channel steps. Returns `[b, Hkv, G, NB]`."""
    half_step = codec.paper_step_norm(codes)
    if half_step is None:
        return delta.max(-1)
    return num.norm_up(q)[..., None] * half_step[:, :, None] * q.shape[-1] ** -0.5
