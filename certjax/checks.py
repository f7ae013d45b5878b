"""The checks of a certified step. Each returns whether it passed; the ladder decides what a failure costs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from certjax.cache import TieredKVCache
from certjax.codecs import fingerprint


def ranking_ok(log_mass: jax.Array, exact_log_mass: jax.Array, promoted: jax.Array, depth: int) -> jax.Array:
    """The `depth` heaviest promoted blocks are the same by tier-1 and by original keys.

    All `[b, Hkv, G, NB]`; returns `[b, Hkv, G]`. Vacuous where fewer than `depth` blocks were promoted.
    """
    depth = min(depth, promoted.shape[-1])

    def top(x):
        value, index = lax.top_k(jnp.where(promoted, x, -jnp.inf), depth)
        return jnp.sort(jnp.where(value > -jnp.inf, index, -1), -1)

    return (top(log_mass) == top(exact_log_mass)).all(-1)


def boundary_ok(
    log_mass: jax.Array,
    delta: jax.Array,
    exact_log_mass: jax.Array,
    promoted: jax.Array,
    active: jax.Array,
    depth: int,
    slack: float,
) -> jax.Array:
    """No block left behind could outweigh the `depth`-th promoted one: `l_b + Delta_b <= l^orig_(r)`.

    All `[b, Hkv, G, NB]` (`active`: `[b, 1, 1, NB]`); returns `[b, Hkv, G]`. Vacuous where nothing was
    promoted.
    """
    depth = min(depth, promoted.shape[-1])
    ranked = lax.top_k(jnp.where(promoted, exact_log_mass, -jnp.inf), depth)[0]
    # With fewer than r promoted blocks the weakest of them is the boundary.
    last = jnp.min(jnp.where(ranked > -jnp.inf, ranked, jnp.inf), -1)
    reach = jnp.where(active & ~promoted, log_mass + delta, -jnp.inf).max(-1)
    return reach <= last + slack


def scores_consistent(
    scores: jax.Array, exact_scores: jax.Array, delta: jax.Array, eps: jax.Array, paged: jax.Array
) -> jax.Array:
    """Canary: on every block read, `|s_orig - s_tier1| <= Delta_t` plus the rounding of both.

    Scores and `delta`: [b, Hkv, G, NB, B]; `eps`: [b, Hkv, G]; `paged`: [b, Hkv, NB]; returns `[b, Hkv, G]`.
    """
    gap = jnp.abs(exact_scores - scores)
    fine = gap <= delta + 2 * eps[..., None, None]
    return (fine | ~paged[:, :, None, :, None]).all((-2, -1))


def values_consistent(residual: jax.Array, eta: jax.Array) -> jax.Array:
    """Canary: on every value block read, `||v_t - v^_t|| <= eta_t`. `[b, Hkv, NB, B]` -> `[b, Hkv]`.

    `v^` is what the plan reads of tier 1 beside the original: under a budget, the centre alone, with `eta = nu`.

    `residual` is 0 where nothing was read; the slack is the rounding of a float32 norm.
    """
    return (residual <= eta * (1 + 2.0**-10)).all((-2, -1))


def scrubbed(cache: TieredKVCache, scrub: int) -> TieredKVCache:
    """A stacked cache with P1 checked on a stripe of blocks of one layer, each layer in turn, and `sound` updated."""
    n_layers = cache.ring_keys.shape[0]
    step = cache.length.max()
    return cache.replace(sound=cache.sound & fingerprints_ok(cache, scrub, step % n_layers, step // n_layers).all(1))


def fingerprints_ok(
    cache: TieredKVCache, scrub: int, layer: jax.Array | None = None, turn: jax.Array | None = None
) -> jax.Array:
    """P1 on one stripe of blocks: each block is visited once in `scrub` turns. Returns `[b, Hkv]` bool.

    `layer` of a stacked cache, or of a cache of one layer; `turn` is its length by default.
    """
    n_blocks = cache.n_blocks
    stripe = -(-n_blocks // scrub)
    turn = cache.length.max() if turn is None else turn
    start = jnp.minimum(turn % scrub * stripe, n_blocks - stripe)

    def cut(x):
        x = x if layer is None else lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)
        return lax.dynamic_slice_in_dim(x, start, stripe, axis=2)

    codes, notes = jax.tree.map(cut, (cache.codes, cache.notes))
    block = start + jnp.arange(stripe)
    # A block that the last token completed may not be encoded yet: the ring holds it.
    closed = block < ((cache.length - 1) // cache.block_size)[:, None, None]
    return ((fingerprint(codes, notes) == notes.checksum) | ~closed).all(-1)
