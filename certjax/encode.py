"""From originals to blocks of tier 1: a prompt at once, and a block when its last token has arrived."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from certjax.codecs import Annotations, Codec, Doubt, HeadStats, annotate
from certjax.codecs.base import Codes
from certjax.policy import Policy
from pallas_kernels import numerics as num

CLOSER = 0.95
"""`centre="auto"` takes the mean of values as their centre where it shortens them by 5% on average. Elsewhere a few
long tokens make the mean, and subtracting it makes the many short ones longer (docs/study.md)."""


def encode_blocks(codec: Codec, keys, values, stats, doubt=None, **options) -> tuple[Codes, Annotations]:
    """`keys`, `values`: [..., NB, B, d] originals; the rest as for `annotate`."""
    # Rounded (again): where the caller's cast to the originals' dtype is in the same program, XLA may have dropped it.
    k, v = (num.representable(x.astype(jnp.float32), x.dtype) for x in (keys, values))
    # Barriers here and for the statistics: what is measured is what is stored, not a second evaluation of it.
    codes = lax.optimization_barrier(codec.encode(k, v, stats))
    return codes, annotate(codec, k, v, stats, codes, doubt, **options)


def _prompt_centre(x: jax.Array, length: jax.Array, mean: bool, closer: bool = False) -> tuple[jax.Array, jax.Array]:
    """The mean of the keys or values `x` [b, Hkv, N, d] of a prompt, or zero: [b, Hkv, d] float32, and how far two
    evaluations of it can lie apart [b, Hkv]. `closer`: the mean only where it brings the tokens closer."""
    b, h, n, d = x.shape
    if not mean:
        return jnp.zeros((b, h, d), jnp.float32), jnp.zeros((b, h), jnp.float32)
    weight = (1.0 / jnp.maximum(length, 1)).astype(jnp.float32)[:, None, None, None]
    weight = jnp.broadcast_to(weight, (b, h, 1, n))
    x = x.astype(jnp.float32)  # zero beyond the length
    centre = num.weighted_sum(weight, x)[:, :, 0]
    magnitude = num.norm_up(num.weighted_sum(weight, jnp.abs(x))[:, :, 0])
    usable = jnp.isfinite(magnitude)
    if closer:
        live = (jnp.arange(n) < length[:, None])[:, None]
        before, after = (jnp.where(live, num.norm_up(y), 0.0).sum(-1) for y in (x, x - centre[:, :, None]))
        usable &= after < CLOSER * before
    return (
        jnp.where(usable[..., None], centre, 0.0),
        jnp.where(usable, 2 * num.gamma(num.sum_depth(n) + 4) * magnitude, 0.0),
    )


def encode_prompt(keys, values, length, policy: Policy, n_blocks: int):
    """Everything but tier 2's placement, for one layer: `[b, Hkv, N, d]` in, a dict of leaves out."""
    b, h, n, d = keys.shape
    size = policy.block_size
    grow = ((0, 0), (0, 0), (0, n_blocks * size - n), (0, 0))
    valid = (jnp.arange(n_blocks * size) < length[:, None])[:, None, :, None]
    keys, values = (jnp.where(valid, jnp.pad(x, grow), 0) for x in (keys, values))

    codec, peaks = policy.make_codec(), (None, None)
    mean = policy.centre != "zero"
    key_centre, key_doubt = _prompt_centre(keys, length, mean and codec.centred)  # of the values: `nu`, of every codec
    value_centre, value_doubt = _prompt_centre(values, length, mean, policy.centre == "auto")
    if codec.scaled:
        peaks = [jnp.abs(x).max((-2, -1)).astype(jnp.float32) for x in (keys, values)]
    stats = HeadStats(key_centre=key_centre, value_centre=value_centre, key_peak=peaks[0], value_peak=peaks[1])
    stats = lax.optimization_barrier(stats)
    blocked = (b, h, n_blocks, size, d)
    codes, notes = encode_blocks(
        codec, keys.reshape(blocked), values.reshape(blocked), stats,
        Doubt(key_centre=key_doubt, value_centre=value_doubt), form=policy.annotations, spectral=policy.spectral,
    )  # fmt: skip
    closed = jnp.arange(n_blocks) < (length // size)[:, None, None]  # [b, 1, NB]

    def only_closed(x):
        return jnp.where(closed.reshape(b, 1, n_blocks, *[1] * (x.ndim - 3)), x, jnp.zeros_like(x))

    ring = [_ring_of(x, length, policy.ring_blocks, size) for x in (keys, values)]
    leaves = dict(
        codes=jax.tree.map(only_closed, codes),
        notes=jax.tree.map(only_closed, notes),
        sink_keys=_head_of(keys, policy.sink_tokens),
        sink_values=_head_of(values, policy.sink_tokens),
        ring_keys=ring[0],
        ring_values=ring[1],
        stats=stats,
    )
    return leaves, (keys, values)


def _head_of(x: jax.Array, n: int) -> jax.Array:
    """First `n` tokens, zeros where the capacity is smaller."""
    x = x[..., :n, :]
    return jnp.pad(x, ((0, 0), (0, 0), (0, n - x.shape[-2]), (0, 0)))


def _ring_of(x: jax.Array, length: jax.Array, ring_blocks: int, size: int) -> jax.Array:
    """The last `ring_blocks` blocks of `[b, Hkv, N, d]` in their slots; zeros where there is none."""
    b, h, n, d = x.shape
    block = ring_block_index(length, ring_blocks, size)  # [b, R]
    blocks = x.reshape(b, h, n // size, size, d)
    picked = jnp.take_along_axis(blocks, jnp.maximum(block, 0)[:, None, :, None, None], axis=2)
    picked = jnp.where((block >= 0)[:, None, :, None, None], picked, 0)
    return picked.reshape(b, h, ring_blocks * size, d)


def ring_block_index(length: jax.Array, ring_blocks: int, size: int) -> jax.Array:
    """Block held by each slot of the ring, negative where none: `[b]` -> `[b, R]`."""
    last = (length - 1)[:, None] // size
    return last - (last - jnp.arange(ring_blocks)) % ring_blocks


def close_block(stored, rings, stats: HeadStats, row: int, block: jax.Array, wanted: jax.Array, lead: int, encode):
    """Encode block `block` of sequence `row` from the ring into `stored`, of one layer or of a stack, where `wanted`.

    Parameters
    ----------
    stored
        Codes and annotations, leaves `[L?, b, Hkv, NB, ...]`.
    rings
        Keys and values, `[L?, b, Hkv, R, B, d]`, block j in slot j mod R.
    stats
        Leaves `[L?, b, Hkv, ...]`.
    lead
        1 where there is an axis L, 0 elsewhere.
    encode
        `(keys, values, stats) -> codes and annotations` of blocks `[L?, Hkv, 1, B, d]`.
    """
    at = jnp.maximum(block, 0)

    def of_row(x):
        return lax.index_in_dim(x, row, lead, keepdims=False)

    k, v = (lax.dynamic_slice_in_dim(of_row(x), at % x.shape[-3], 1, axis=lead + 1) for x in rings)
    encoded = encode(k, v, jax.tree.map(of_row, stats))

    def put(x, fresh):
        start = (*[0] * lead, row, 0, at, *[0] * (x.ndim - lead - 3))
        fresh = jnp.expand_dims(fresh, lead)
        kept = jnp.where(wanted, fresh, lax.dynamic_slice(x, start, fresh.shape))
        return lax.dynamic_update_slice(x, kept, start)

    return jax.tree.map(put, stored, encoded)


def close_blocks(stored, rings, stats: HeadStats, block: jax.Array, wanted: jax.Array, lead: int, encode):
    """`close_block` of all sequences at once: `block`, `wanted` `[b]`, `encode` of blocks `[L?, b, Hkv, 1, B, d]`."""
    at = jnp.maximum(block, 0)

    def held(x):
        slot = (at % x.shape[-3]).reshape(*[1] * lead, -1, 1, 1, 1, 1)
        return jnp.take_along_axis(x, slot, axis=lead + 2)

    encoded = encode(*map(held, rings), stats)

    def put(x, fresh):
        # Every axis up to the blocks' is indexed, so that XLA has no reason to transpose the array. Beyond its end,
        # where nothing is wanted, nothing is stored.
        heads = jnp.ix_(*map(jnp.arange, x.shape[: lead + 2]))
        place = jnp.where(wanted, at, x.shape[lead + 2])[:, None]
        fresh = jnp.squeeze(fresh, lead + 2)
        return x.at[(*heads, place)].set(fresh, mode="drop", unique_indices=True)

    return jax.tree.map(put, stored, encoded)
