"""Twin of `originals/triton.py`: attention over all originals of chosen heads; and over tiles, and pieces, of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.levels import TILE, promoted_pieces, tokens_of_a_piece
from pallas_kernels.query import PARTS, SHIFT_EXACT, UNIT_EXACT, Operands, distinct, together, twice, whole
from pallas_kernels.twins import in_first

LOWEST = -1e30
"""Score of what is not attended to."""


def attend_tile_of_originals(
    keys: jax.Array,  # [H, 128, d]
    values: jax.Array,  # [H, 128, d]
    live: jax.Array,  # [H] int32, tokens to attend to, the first ones; or which, [H, 128] bool
    q: Operands,
    alone: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`sum w v` [H, d, G], and [H, 4, G], of the G = C/2 first columns: `sum w`, the squares of the longest key and of
    the longest value (where the first ones are attended to, of all tokens of a tile that has one; what is not must be
    finite), and the largest score x, with `w_t = 2^(x_t - x)`."""
    first = live.ndim == 1
    seen = ((jnp.arange(TILE) < live[:, None]) if first else live)[..., None]
    read = jnp.broadcast_to((live > 0)[:, None], (live.shape[0], TILE)) if first else live
    k, v = (jnp.where(read[..., None], x.astype(jnp.float32), 0.0) for x in (keys, values))
    parts = distinct(q.wide[:, PARTS:], 2).astype(jnp.float32)
    dot = together(jnp.einsum("htd,hpcd->phtc", k, parts, precision="highest"))
    shift = 0.0 if alone else q.row(SHIFT_EXACT)
    # A barrier: the largest score and the weights are of one evaluation, as in the kernel.
    x = jax.lax.optimization_barrier(jnp.where(seen, dot * q.row(UNIT_EXACT) + shift, LOWEST))
    peak = x.max(1)
    w = jnp.where(seen, jnp.exp2(x - peak[:, None]), 0.0)
    acc = jnp.einsum("htd,htc->hdc", v, w, precision="highest")
    total = w.sum(1)
    longest = (jnp.broadcast_to((x * x).sum(-1).max(1, keepdims=True), total.shape) for x in (k, v))
    return acc, jnp.stack([total, *longest, peak], 1)


def attend_originals(
    layer: jax.Array,  # [1] int32
    meta: jax.Array,  # [H, 3] int32
    chosen: jax.Array,  # [H] int32, 0 where nothing is read (and nothing found; in the kernel: anything)
    q: Operands,
    keys: jax.Array,  # [L, H, N, d] bfloat16, in host memory or on the device
    values: jax.Array,  # [L, H, N, d] bfloat16
    *,
    splits: int = 1,
    alone: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """As `attend_tile_of_originals`, of all tokens of the chosen heads: [H, S, d, C], halves to be added up, and
    [H, S, 4, C], in S = `splits` parts, programs that share the tiles of a head. `alone`: scores are not less the
    reference, which rests on what is known of tier 1."""
    n = keys.shape[2]
    start = jnp.arange(n // TILE) * TILE
    live = jnp.where(chosen[:, None] > 0, meta[:, 2:] - start, 0)
    return _in_parts(layer, live, q, keys, values, splits, alone)


def attend_pieces(
    layer: jax.Array,
    words: jax.Array,  # [H, NT] int32, `pallas_kernels.levels`
    q: Operands,
    keys: jax.Array,
    values: jax.Array,
    *,
    splits: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """As `attend_originals`, of the pieces that are promoted; all in the first part, which always is at work."""
    d = keys.shape[3]
    live = jnp.repeat(promoted_pieces(words, d), tokens_of_a_piece(d), axis=2)  # [H, NT, 128]
    acc, sums = _in_parts(layer, live, q, keys, values, 1, False)
    return in_first(acc[:, 0], splits), in_first(sums[:, 0], splits)


def _in_parts(layer, live, q: Operands, keys, values, splits: int, alone: bool) -> tuple[jax.Array, jax.Array]:
    """`live`: of each tile as `attend_tile_of_originals` takes it, [H, NT, ...]."""
    heads, _, d = keys.shape[1:]
    k, v = (_on_device(x, layer[0]).reshape(heads, -1, TILE, d).swapaxes(0, 1) for x in (keys, values))

    def tile(x):
        return attend_tile_of_originals(*x, q, alone)

    acc, sums = jax.lax.map(tile, (k, v, live.swapaxes(0, 1)))  # [NT, H, d, G], [NT, H, 4, G]
    pad = -acc.shape[0] % splits
    acc = jnp.pad(acc, ((0, pad), (0, 0), (0, 0), (0, 0)))
    sums = jnp.concatenate([sums, jnp.zeros((pad, *sums.shape[1:])).at[:, :, 3].set(LOWEST)])
    acc, sums = (x.reshape(-1, splits, *x.shape[1:]).swapaxes(1, 2) for x in (acc, sums))  # [., H, S, ...]
    peak = sums[..., 3, :].max(0)
    scale = jnp.exp2(sums[..., 3, :] - peak)
    total = (sums[..., 0, :] * scale).sum(0)
    sums = jnp.stack([total, *(sums[..., i, :].max(0) for i in (1, 2)), peak], 2)
    return whole((acc * scale[..., None, :]).sum(0)), twice(sums)


def _on_device(x: jax.Array, layer: jax.Array) -> jax.Array:
    piece = jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)
    in_host_memory = jax.typeof(piece).memory_space == jax.memory.Space.Host
    return jax.device_put(piece, jax.memory.Space.Device) if in_host_memory else piece
