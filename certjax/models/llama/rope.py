"""Rotary position embeddings in float32, in the rotate-half layout of Hugging Face checkpoints."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from certjax.models.llama.config import LlamaConfig, RopeScaling


def inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians per position of each pair of channels, `[d/2]` float32, scaling included."""
    # Float32 throughout: the frequencies a model was trained with are the rounded ones, and at position 100,000
    # one rounding of a frequency turns a channel by milliradians.
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    inv_freq = np.float32(1.0) / np.float32(config.rope_theta) ** exponents
    if config.rope_scaling is None:
        return inv_freq
    return _scaled(inv_freq, config.rope_scaling).astype(np.float32)


def _scaled(inv_freq: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    stretched = inv_freq / np.float32(scaling.factor)
    if scaling.rope_type == "linear":
        return stretched
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings / (2 * math.pi / inv_freq)  # in the original context
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * stretched + smooth * inv_freq


def rotation(config: LlamaConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine for each position: `[b, T]` int32 -> two `[b, T, 1, d/2]` float32."""
    angles = positions[..., None, None].astype(jnp.float32) * inverse_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate queries or keys `[b, T, H, d]`; computed in float32, returned in the dtype of `x`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # channel i pairs with i + d/2
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
