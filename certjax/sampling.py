"""Next-token sampling: greedy, temperature, top-k and nucleus, with explicit keys."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from certjax.errors import InvalidArgumentError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `temperature=0` is greedy; `top_k=0` and `top_p=1` keep the whole vocabulary.

    Raises
    ------
    InvalidArgumentError
        On a negative temperature or top_k, or a top_p outside (0, 1].
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise InvalidArgumentError(f"temperature must be >= 0 (0 is greedy), got {self.temperature}.")
        if self.top_k < 0:
            raise InvalidArgumentError(f"top_k must be >= 0 (0 keeps all tokens), got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise InvalidArgumentError(f"top_p must be in (0, 1], got {self.top_p}.")


def sample(logits: jax.Array, sampling: Sampling, key: jax.Array, step: jax.Array) -> jax.Array:
    """Draw one token per row. `logits`: [b, V] float32 -> [b] int32.

    Row r at step s uses `fold_in(fold_in(key, r), s)`: what a prompt gets does not depend on its neighbours
    in the batch being longer or shorter.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k and sampling.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits >= kth, logits, -jnp.inf)
    if sampling.top_p < 1:
        logits = jnp.where(_in_nucleus(logits, sampling.top_p), logits, -jnp.inf)

    def draw(row, scores):
        return jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, row), step), scores)

    return jax.vmap(draw)(jnp.arange(logits.shape[0]), logits).astype(jnp.int32)


def _in_nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """Tokens of the smallest set whose probability reaches `top_p`: bool [b, V]."""
    ordered = jnp.sort(logits, -1)[:, ::-1]
    p = jax.nn.softmax(ordered, -1)
    # Keep a token while the mass before it is below top_p; the first is always kept.
    kept = (jnp.cumsum(p, -1) - p) < top_p
    threshold = jnp.where(kept, ordered, jnp.inf).min(-1, keepdims=True)
    return logits >= threshold
