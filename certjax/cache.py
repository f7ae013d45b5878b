"""`TieredKVCache`: quantized KV blocks on the device, the originals in host memory, as one pytree.

Layout, with `NB` blocks of `B` tokens, `N = NB * B` the capacity. A stacked cache has one more leading
axis `L` on every leaf but `length`; `at(layer)` is a view of one layer that the attention reads.

* tier 1, `codes` and `notes`: every closed block, `[b, Hkv, NB, ...]`;
* windows, on the device in original precision: the first `sink_tokens`, and a ring of the last
  `recent_tokens` plus the block being filled, `[b, Hkv, R*B, d]` where block j sits in slot j mod R;
* tier 2, every original, bit for bit, `[b, Hkv, N, d]` in `pinned_host` memory, of which pieces are read and
  written one after another; or, where the policy says `tier2="device"`, on the device, all sequences at once.

A block is encoded once, when its last token arrives, and is never touched again.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from certjax import host
from certjax.codecs import Annotations, Codec, HeadStats, fingerprint
from certjax.codecs.base import Codes
from certjax.codecs.notes import Shares
from certjax.encode import close_block, close_blocks, encode_blocks, encode_prompt
from certjax.errors import ContextLengthError, InvalidArgumentError, MissingTier2Error
from certjax.ordering import not_before
from certjax.policy import Policy, require_policy
from certjax.writing import write_originals_of_row, write_row, write_rows
from pallas_kernels import numerics as num
from pallas_kernels.levels import TILE, initial_plan

ORIGINAL_DTYPES = ("float16", "bfloat16", "float32")


@struct.dataclass
class TieredKVCache:
    """Tiered KV cache of one layer, or of all layers stacked. Immutable: every update returns a new one."""

    codes: Codes  # [b, Hkv, NB, ...]
    notes: Annotations  # [b, Hkv, NB, ...]
    sink_keys: jax.Array  # [b, Hkv, S, d]
    sink_values: jax.Array
    ring_keys: jax.Array  # [b, Hkv, R*B, d]
    ring_values: jax.Array
    stats: HeadStats  # [b, Hkv, d] and [b, Hkv] float32
    host_keys: jax.Array | None  # [b, Hkv, N, d]
    host_values: jax.Array | None
    length: jax.Array  # [b] int32, tokens held
    layer: jax.Array | None = None  # [] int32: tier 2 of this view is layer `layer` of a stacked one
    plan: jax.Array | None = None  # [b, Hkv, NB] uint16, what fused kernels read of each block (`fused/plan.py`)
    sound: jax.Array | None = None  # [b] bool, outcome of the fingerprints checked so far (`checks.scrubbed`)
    codec: Codec = struct.field(pytree_node=False, default=None)
    block_size: int = struct.field(pytree_node=False, default=16)
    tier2: str = struct.field(pytree_node=False, default="host")  # `Policy.tier2`

    def __repr__(self) -> str:
        shape = getattr(self.host_keys, "shape", None)
        return (
            f"TieredKVCache({self.codec!r}, block_size={self.block_size}, originals {shape} in {self.tier2} memory; "
            ".length, .capacity, .nbytes())"
        )

    # -- shapes ---------------------------------------------------------------------------------------

    @property
    def n_blocks(self) -> int:
        """NB, blocks that fit."""
        return self.notes.checksum.shape[-1]

    @property
    def capacity(self) -> int:
        """N, tokens that fit."""
        return self.n_blocks * self.block_size

    @property
    def ring_blocks(self) -> int:
        """R, blocks in the recent window's ring."""
        return self.ring_keys.shape[-2] // self.block_size

    @property
    def head_dim(self) -> int:
        """d."""
        return self.ring_keys.shape[-1]

    @property
    def note_form(self) -> str:
        """How annotations are stored: "bfloat16" or "byte"."""
        return "byte" if isinstance(self.notes.nu, Shares) else "bfloat16"

    @property
    def spectral(self) -> bool:
        """Whether blocks carry spectral norms of their residuals."""
        return self.notes.sigma_k is not None

    def nbytes(self) -> dict[str, int]:
        """Bytes of the arrays, tier by tier: `tier1` (codes, metadata, annotations), `windows`, `tier2`."""
        windows = (self.sink_keys, self.sink_values, self.ring_keys, self.ring_values)
        return {
            "tier1": host.nbytes(*jax.tree.leaves((self.codes, self.notes, self.stats))),
            "windows": host.nbytes(*windows),
            "tier2": host.nbytes(self.host_keys, self.host_values),
        }

    @property
    def holds_all(self) -> jax.Array:
        """P5, whether every token that was counted has a place: `[batch]` bool. (Under jit `append` refuses none.)"""
        return self.length <= self.capacity

    # -- construction ---------------------------------------------------------------------------------

    @classmethod
    def from_prefill(
        cls,
        keys: jax.Array,
        values: jax.Array,
        policy: Policy,
        *,
        lengths: jax.Array | None = None,
        capacity: int | None = None,
    ) -> TieredKVCache:
        """Encode the keys and values of a prompt.

        Parameters
        ----------
        keys, values : `[batch, Hkv, N, d]`, or `[L, batch, Hkv, N, d]` for a stacked cache
            Originals, post-RoPE, float16, bfloat16 or float32.
        policy
            Chooses codec, block size, windows, and where tier 2 is.
        lengths : `[batch]` int32, optional
            Tokens of each sequence; what lies beyond is ignored. Default: N for all.
        capacity
            Tokens the cache can grow to, rounded up to whole blocks. Default: N plus one block.

        Raises
        ------
        InvalidArgumentError
            On mismatched shapes, an unsupported dtype, a head dim or capacity beyond what certificates cover, a
            capacity below N, or (outside jit) lengths beyond N.
        """
        require_policy(policy)
        _check_originals(keys, values)
        n = keys.shape[-2]
        capacity = n + policy.block_size if capacity is None else capacity
        length = _checked_lengths(n if lengths is None else lengths, keys.shape[-4], n)

        def one_layer(kv):
            return cls.encode_layer(*kv, policy, length, capacity)

        layers = one_layer((keys, values)) if keys.ndim == 4 else lax.map(one_layer, (keys, values))
        return cls.of_layers(layers, policy, length)

    @staticmethod
    def encode_layer(
        keys: jax.Array, values: jax.Array, policy: Policy, lengths: jax.Array, capacity: int
    ) -> dict[str, Any]:
        """What a layer of a cache holds of a prompt, `[batch, Hkv, N, d]`, its originals in tier 2's memory: a tree for
        `of_layers`, by itself or stacked. Arguments and errors as of `from_prefill`."""
        _check_originals(keys, values)
        n, block = keys.shape[-2], policy.block_size
        if capacity < n:
            raise InvalidArgumentError(f"capacity={capacity} is less than the {n} tokens of the prompt.")
        if capacity > MAX_CAPACITY:
            raise InvalidArgumentError(
                f"capacity={capacity} exceeds the {MAX_CAPACITY} tokens that certificates cover."
            )
        n_blocks = -(-capacity // block)
        if n_blocks + block > MAX_DEPTH:
            raise InvalidArgumentError(
                f"capacity={capacity} in blocks of block_size={block} makes sums longer than certificates cover; "
                "choose a larger block_size."
            )
        leaves, originals = encode_prompt(keys, values, lengths, policy, n_blocks)
        if policy.tier2 == "host":
            kind = host.host_memory_kind()
            originals = [host.to_host(x, kind) for x in originals]
        else:  # rounded (again), as in `encode_blocks`: the caller's cast may be in the same program
            originals = [num.cast(x, x.dtype) for x in originals]
        return leaves | dict(zip(("host_keys", "host_values"), originals, strict=True))

    @classmethod
    def of_layers(cls, layers: dict[str, Any], policy: Policy, lengths: jax.Array) -> TieredKVCache:
        """From what `encode_layer` made, of one layer or stacked."""
        blocks = layers["notes"].checksum.shape  # [L?, batch, Hkv, NB]
        return cls(
            **layers,
            length=lengths,
            plan=initial_plan(blocks) if policy.block_size == TILE else None,
            sound=jnp.ones(lengths.shape, bool),
            codec=policy.make_codec(),
            block_size=policy.block_size,
            tier2=policy.tier2,
        )

    def at(self, layer: jax.Array) -> TieredKVCache:
        """View of one layer of a stacked cache. Tier 2 is not sliced here (that would copy a layer of host
        memory); `page_in` adds the layer's index to what it reads."""
        names = ("codes", "notes", "sink_keys", "sink_values", "ring_keys", "ring_values", "stats", "plan")
        stacked = {name: getattr(self, name) for name in names}
        leaves = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, layer, 0, keepdims=False), stacked)
        return self.replace(**leaves, layer=layer)

    def stacked(self) -> TieredKVCache:
        """A one-layer cache as a stack of one."""
        alone = ("length", "layer", "sound", "codec", "block_size", "tier2")
        leaves = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in alone}
        return self.replace(**jax.tree.map(lambda x: x[None], leaves))

    # -- growth ---------------------------------------------------------------------------------------

    def append(self, k: jax.Array, v: jax.Array) -> TieredKVCache:
        """Add one token per sequence to a one-layer cache. `k`, `v`: `[batch, Hkv, d]`.

        The block that the token completes is encoded. Under jit a token that a full cache has no place for is counted
        and not stored: from then on the sequence fails its precondition (`Certificate.precondition_ok`). `generate`
        sizes the cache so that this does not happen.

        Raises
        ------
        ContextLengthError
            If called outside jit on a cache that is full.
        InvalidArgumentError
            If `k` or `v` has another shape than `[batch, Hkv, d]`.
        """
        expected = (*self.ring_keys.shape[:-2], self.head_dim)
        for name, x in (("k", k), ("v", v)):
            if x.shape != expected:
                raise InvalidArgumentError(f"{name} has shape {x.shape}, the cache appends {expected}.")
        if not isinstance(self.length, jax.core.Tracer) and (np.asarray(self.length) >= self.capacity).any():
            raise ContextLengthError(
                f"the cache is full ({self.capacity} tokens); build it with a larger `capacity`."
            )
        return self.write(k, v).advance()

    def counting(self) -> TieredKVCache:
        """With one more token counted, which is stored or about to be: what a query of that token attends to."""
        return self.replace(length=self.length + 1)

    def advance(self) -> TieredKVCache:
        """Count the token that `write` stored, once for all layers, and encode the blocks that it completed.

        A block leaves the ring, and is read from tier 1, a step later at the earliest. One conditional for all layers:
        of 16 steps, 15 complete nothing and skip the encoding.
        """
        cache = self.counting()
        size, lead = self.block_size, self.ring_keys.ndim - 4  # 1 where stacked
        closes = (cache.length % size == 0) & (cache.length <= self.capacity)
        rings = [x.reshape(*x.shape[:-2], -1, size, x.shape[-1]) for x in (self.ring_keys, self.ring_values)]
        encode = functools.partial(_encoder, codec=self.codec, form=self.note_form, spectral=self.spectral)

        def close(stored):
            if self.tier2 == "device":
                return close_blocks(stored, rings, self.stats, cache.length // size - 1, closes, lead, encode)
            for row in range(cache.length.shape[0]):
                block = cache.length[row] // size - 1
                stored = close_block(stored, rings, self.stats, row, block, closes[row], lead, encode)
            return stored

        codes, notes = lax.cond(closes.any(), close, lambda stored: stored, (self.codes, self.notes))
        return cache.replace(codes=codes, notes=notes)

    def write(self, k: jax.Array, v: jax.Array, layer: jax.Array | None = None) -> TieredKVCache:
        """Store one token per sequence, `[batch, Hkv, d]`, at position `length` (of layer `layer` when the
        cache is stacked) without counting it yet. In place under jit when the cache is donated."""
        at = () if layer is None else (layer,)
        if self.tier2 == "device":
            return write_rows(self, k, v, at)
        cache = self
        for row in range(self.length.shape[0]):
            cache = write_row(cache, row, k[row], v[row], at)
        return cache

    def write_originals(
        self, k: jax.Array, v: jax.Array, layer: jax.Array, after: jax.Array | None = None
    ) -> TieredKVCache:
        """As `write`, in tier 2 alone, of the token that was counted last: the windows hold it already.

        `after`: a number that what is read of tier 2 before has led to (`ordering.not_before`).
        """
        cache = self
        for row in range(self.length.shape[0]):
            place = self.length[row] - 1
            place = place if after is None else not_before(place, after)
            cache = write_originals_of_row(cache, row, place, k[row], v[row], (layer,))
        return cache

    # -- tier 2 ---------------------------------------------------------------------------------------

    def require_tier2(self) -> None:
        """Refuse a cache whose originals are missing or not where they belong (P4): where the policy said when the
        cache was built, if the backend has such memory.

        Raises
        ------
        MissingTier2Error
        """
        if self.host_keys is None or self.host_values is None:
            raise MissingTier2Error(
                "tier 2 (the original keys and values) is missing from this cache, so nothing can be certified "
                "or recovered; keep host_keys and host_values, or use mode='naive' to run without guarantees."
            )
        for name in ("host_keys", "host_values"):
            x = getattr(self, name)
            if self.tier2 == "device":
                if host.in_host_memory(x):
                    raise MissingTier2Error(
                        f"{name} is in {host.PINNED} memory, and the cache was built with tier2='device'; move it back "
                        "with jax.device_put(x, jax.memory.Space.Device)."
                    )
            elif host.host_memory_kind() == host.PINNED and not host.in_host_memory(x):
                raise MissingTier2Error(
                    f"{name} is in {jax.typeof(x).memory_space} and not in {host.PINNED} memory; move it back "
                    "with jax.device_put(x, jax.memory.Space.Host), or build the cache with tier2='device'."
                )

    def originals(self) -> tuple[jax.Array, jax.Array] | None:
        """All original keys and values of this layer, `[b, Hkv, N, d]`; None where they are in host memory, of which
        only pieces are read."""
        if self.tier2 == "host":
            return None
        both = self.host_keys, self.host_values
        if self.layer is None:
            return both
        return tuple(lax.dynamic_index_in_dim(x, self.layer, 0, keepdims=False) for x in both)

    def page_in(self, row, head, start, size: int) -> tuple[jax.Array, jax.Array]:
        """`size` original keys and values `[size, d]` of one sequence and KV head, on the device."""
        return self.page_in_keys(row, head, start, size), self.page_in_values(row, head, start, size)

    def page_in_keys(self, row, head, start, size: int) -> jax.Array:
        """`size` original keys `[size, d]`."""
        return self._page(self.host_keys, row, head, start, size)

    def page_in_values(self, row, head, start, size: int) -> jax.Array:
        """`size` original values `[size, d]`."""
        return self._page(self.host_values, row, head, start, size)

    def _page(self, tier2, row, head, start, size):
        at = () if self.layer is None else (self.layer,)
        starts = (*at, row, head, start, 0)
        piece = host.read(tier2, starts, (*[1] * (len(at) + 2), size, self.head_dim))
        return piece.reshape(size, self.head_dim)

    # -- P1 -------------------------------------------------------------------------------------------

    def verify(self) -> jax.Array:
        """Whether each block's codes, metadata and annotations are what was stored: bool `[..., NB]`.
        Blocks that were never closed count as intact."""
        stored = self.notes.checksum
        closed = jnp.arange(self.n_blocks) < (self.length // self.block_size)[:, None, None]
        return (fingerprint(self.codes, self.notes) == stored) | ~closed


MAX_CAPACITY = 2**22
"""Tokens a cache may hold: the float32 sums of the certificate are proved up to here (docs/bounds.md, section 9)."""


MAX_DEPTH = 2**19 - 2
"""Longest chain of additions, a block's and then one a block, for which the bound's own rounding is paid for."""


def _checked_lengths(lengths: jax.Array | int, batch: int, n: int) -> jax.Array:
    """Of sequences, `[batch]` int32, of originals that have room for `n` tokens each."""
    known = not isinstance(lengths, jax.core.Tracer)
    if known:  # by NumPy: under jit JAX's own operations on what is known make what is not
        lengths = np.broadcast_to(lengths, (batch,)) if np.ndim(lengths) == 0 else np.asarray(lengths)
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise InvalidArgumentError(
            f"lengths must be [batch] integers with batch={batch}; got {lengths.dtype} {lengths.shape}."
        )
    if known and ((lengths < 0) | (lengths > n)).any():
        raise InvalidArgumentError(f"lengths must be from 0 to the {n} tokens given; got {lengths.tolist()}.")
    return jnp.asarray(lengths, jnp.int32)


def _check_originals(keys: jax.Array, values: jax.Array) -> None:
    if keys.shape != values.shape or keys.ndim not in (4, 5):
        raise InvalidArgumentError(
            f"keys and values must both be [batch, Hkv, N, d] (or [L, batch, Hkv, N, d]); got {keys.shape} "
            f"and {values.shape}."
        )
    if keys.shape[-1] > num.MAX_HEAD_DIM:
        raise InvalidArgumentError(
            f"head dim {keys.shape[-1]} exceeds the {num.MAX_HEAD_DIM} that certificates cover."
        )
    if keys.dtype != values.dtype or str(keys.dtype) not in ORIGINAL_DTYPES:
        raise InvalidArgumentError(
            f"keys and values must share one dtype of {', '.join(ORIGINAL_DTYPES)}; got {keys.dtype} and "
            f"{values.dtype}."
        )


def _encoder(keys, values, stats, *, codec: Codec, **options) -> tuple[Codes, Annotations]:
    return encode_blocks(codec, keys, values, stats, **options)
