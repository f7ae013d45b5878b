"""`DenseKVCache`: the originals of all layers on the device. What prefill fills, and the dense mode's cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from certjax import host
from certjax.errors import InvalidArgumentError
from pallas_kernels import numerics as num

if TYPE_CHECKING:
    from certjax.models.llama.config import LlamaConfig


@struct.dataclass
class DenseKVCache:
    """Keys and values of all layers, stacked. Immutable: every update returns a new one.

    Attributes
    ----------
    keys, values : `[L, b, Hkv, N, d]`
        After the rotary embedding, in the cache's dtype. What lies at or beyond `length` may be anything.
    length : `[b]` int32
        Tokens held of each sequence.
    """

    keys: jax.Array
    values: jax.Array
    length: jax.Array

    @classmethod
    def zeros(
        cls, n_layers: int, batch: int, n_kv_heads: int, max_length: int, head_dim: int, dtype: Any
    ) -> DenseKVCache:
        """An empty cache with room for `max_length` tokens per sequence."""
        shape = (n_layers, batch, n_kv_heads, max_length, head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32))

    @classmethod
    def empty(
        cls, config: LlamaConfig, batch: int, max_length: int, *, n_layers: int | None = None
    ) -> DenseKVCache:
        """The same for a model, of all its layers unless given."""
        n_layers = config.n_layers if n_layers is None else n_layers
        dtype = jnp.dtype(config.kv_dtype)
        return cls.zeros(n_layers, batch, config.n_kv_heads, max_length, config.head_dim, dtype)

    @property
    def max_length(self) -> int:
        """N, tokens that fit."""
        return self.keys.shape[-2]

    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return host.nbytes(self.keys, self.values)

    def advance(self, n: jax.Array | int) -> DenseKVCache:
        """Count `n` more tokens (`[]` or `[b]`), once for all layers."""
        return self.replace(length=self.length + n)

    def write(self, k: jax.Array, v: jax.Array, layer: jax.Array, start: jax.Array | int) -> DenseKVCache:
        """Store T tokens per sequence in one layer, without counting them.

        In place under jit when the cache is donated or carried by a loop.

        Parameters
        ----------
        k, v : `[b, T, Hkv, d]`
            Rounded to the cache's dtype.
        layer : `[]` int32
        start : `[]` int32, or `[b]` int32 where T is 1
            Column of the first token, the same for all sequences or one for each. The tokens must fit: beyond
            `max_length - T` the write lands on the last columns.

        Raises
        ------
        InvalidArgumentError
            If the shapes do not fit the cache, or `start` is per sequence and T is not 1.
        """
        _, b, n_heads, n, d = self.keys.shape
        t = k.shape[1]
        if k.shape != (b, t, n_heads, d) or v.shape != k.shape or t > n:
            raise InvalidArgumentError(
                f"k {k.shape} and v {v.shape} do not fit a cache of {b} sequences, {n_heads} KV heads, {n} tokens "
                f"and head dim {d}; both must be [batch, T, Hkv, d]."
            )
        start = jnp.asarray(start, jnp.int32)
        if start.ndim and (start.shape != (b,) or t != 1):
            raise InvalidArgumentError(
                f"start of shape {start.shape} with T={t}: give one start for all sequences, or one for each of "
                f"the {b} sequences and a single token."
            )
        return self.replace(keys=_store(self.keys, k, layer, start), values=_store(self.values, v, layer, start))


def _store(stack: jax.Array, tokens: jax.Array, layer: jax.Array, start: jax.Array) -> jax.Array:
    tokens = num.cast(tokens, stack.dtype).swapaxes(1, 2)[None]  # [1, b, Hkv, T, d]
    if start.ndim == 0:
        return lax.dynamic_update_slice(stack, tokens, (layer, 0, 0, start, 0))
    for row in range(stack.shape[1]):
        stack = lax.dynamic_update_slice(stack, tokens[:, row : row + 1], (layer, row, 0, start[row], 0))
    return stack
