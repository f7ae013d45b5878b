"""Promotion: read the originals of chosen blocks from the host tier, block by block.

A block is read once for the `G` query heads of its KV head, whichever of them asked for it. Originals that are on the
device anyway are all read at once (`..._together`): loops over blocks are slow there.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import numerics as num

PageIn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""`(row, kv_head, block) -> [B, d]` originals of one block, on the device."""


def promoted_scores(
    q: jax.Array,  # [b, Hkv, G, d] float32
    scores: jax.Array,  # [b, Hkv, G, NB, B] with tier-1 keys
    pages: jax.Array,  # [b, Hkv, NB] bool, blocks to read
    page_in_keys: PageIn,
) -> jax.Array:  # [b, Hkv, G, NB, B]
    """`scores`, with the blocks in `pages` rescored with their original keys."""

    def visit(row, head, block, s):
        exact = num.dot_scores(q[row, head], page_in_keys(row, head, block).astype(jnp.float32))
        return lax.dynamic_update_slice(s, exact[None, None, :, None], (row, head, 0, block, 0))

    return _for_each_page(pages, visit, scores)


def promoted_values(
    w: jax.Array,  # [b, Hkv, G, NB, B] softmax numerators
    promoted: jax.Array,  # [b, Hkv, G, NB] bool
    d: int,
    decoded: PageIn,  # what tier 1 says of the block
    page_in_values: PageIn,
) -> tuple[jax.Array, jax.Array]:
    """`sum w v` over promoted blocks `[b, Hkv, G, d]`, and `||v_t - v^_t||` of the tokens read
    `[b, Hkv, NB, B]` (0 elsewhere), for the canary."""
    b, n_heads, group, n_blocks, size = w.shape
    w = jnp.where(promoted[..., None], w, 0.0)

    def visit(row, head, block, carry):
        acc, residual = carry
        v = page_in_values(row, head, block).astype(jnp.float32)
        w_block = lax.dynamic_slice(w, (row, head, 0, block, 0), (1, 1, group, 1, size))[0, 0, :, 0]
        old = lax.dynamic_slice(acc, (row, head, 0, 0), (1, 1, group, d))
        new = old + jnp.einsum("gt,td->gd", w_block, v, precision=lax.Precision.HIGHEST)
        r = num.norm_up(v - decoded(row, head, block))
        return (
            lax.dynamic_update_slice(acc, new, (row, head, 0, 0)),
            lax.dynamic_update_slice(residual, r[None, None, None], (row, head, block, 0)),
        )

    start = jnp.zeros((b, n_heads, group, d)), jnp.zeros((b, n_heads, n_blocks, size))
    return _for_each_page(promoted.any(2), visit, start)


def promoted_scores_together(
    q: jax.Array,  # [b, Hkv, G, d] float32
    scores: jax.Array,  # [b, Hkv, G, NB, B] with tier-1 keys
    pages: jax.Array,  # [b, Hkv, NB] bool
    keys: jax.Array,  # [b, Hkv, NB * B, d] originals on the device
) -> jax.Array:  # [b, Hkv, G, NB, B]
    """`promoted_scores`: all blocks are scored, those in `pages` taken."""
    exact = num.dot_scores(q, keys.astype(jnp.float32)).reshape(scores.shape)
    # A barrier: every use of a score is of the same float32 number.
    return lax.optimization_barrier(jnp.where(pages[:, :, None, :, None], exact, scores))


def promoted_values_together(
    w: jax.Array,  # [b, Hkv, G, NB, B] softmax numerators
    promoted: jax.Array,  # [b, Hkv, G, NB] bool
    decoded: jax.Array,  # [b, Hkv, NB, B, d] what tier 1 says
    values: jax.Array,  # [b, Hkv, NB * B, d] originals on the device
) -> tuple[jax.Array, jax.Array]:
    """`promoted_values`: all blocks are read, those promoted counted."""
    read = promoted.any(2)[..., None]  # [b, Hkv, NB, 1]
    w = jnp.where(promoted[..., None], w, 0.0)
    # where, not the weight of 0: what is not read may be anything, NaN included.
    v = jnp.where(read[..., None], values.astype(jnp.float32).reshape(decoded.shape), 0.0)
    of_block = jnp.einsum("bhgns,bhnsd->bhngd", w, v, precision=lax.Precision.HIGHEST)
    # A barrier between the sum of a block and that of the blocks: as many additions as block by block, at most.
    summed = lax.optimization_barrier(of_block).sum(2)
    return summed, jnp.where(read, num.norm_up(v - decoded), 0.0)


def _for_each_page(pages: jax.Array, visit, carry):
    """Run `visit(row, head, block, carry)` for every true entry of `pages` [b, Hkv, NB]."""
    b, n_heads, n_blocks = pages.shape
    count = pages.sum(-1)
    # Positions of the true entries, in order, compacted to the front.
    slot = jnp.where(pages, jnp.cumsum(pages, -1) - 1, n_blocks)
    blocks = jnp.arange(n_blocks, dtype=jnp.int32)
    compact = jax.vmap(lambda s: jnp.zeros(n_blocks, jnp.int32).at[s].set(blocks, mode="drop"))
    listed = compact(slot.reshape(-1, n_blocks)).reshape(pages.shape)

    def per_head(i, carry):
        row, head = i // n_heads, i % n_heads
        return lax.fori_loop(
            0, count[row, head], lambda j, c: visit(row, head, listed[row, head, j], c), carry
        )

    return lax.fori_loop(0, b * n_heads, per_head, carry)
