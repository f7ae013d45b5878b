"""What a step reads: the windows, and tier 1 at a precision chosen block by block.

`Problem` holds what every attempt of a step shares; `read_keys` and `read_values` decode tier 1 at given levels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from certjax.bounds import arithmetic
from certjax.bounds.perturbation import paper_delta, score_delta
from certjax.cache import TieredKVCache
from certjax.codecs import notes as nt
from certjax.codecs.base import Level
from certjax.encode import ring_block_index
from pallas_kernels import numerics as num
from pallas_kernels.attend.reference import accumulation_depth


@struct.dataclass
class Problem:
    """One layer at one step. `Nw` counts the tokens of both windows."""

    q: jax.Array  # [b, Hkv, G, d] float32
    eps: jax.Array  # [b, Hkv, G] rounding of a computed score
    nu: jax.Array  # [b, Hkv, NB, B]
    active: jax.Array  # [b, 1, 1, NB] bool, blocks read from tier 1
    window_scores: jax.Array  # [b, Hkv, G, Nw]
    window_values: jax.Array  # [b, Hkv, Nw, d] float32
    window_nu: jax.Array  # [b, Hkv, Nw]
    window_live: jax.Array  # [b, Nw] bool
    nu_max: jax.Array  # [b, Hkv]
    centre: jax.Array  # [b, Hkv, d]

    def depth(self, promoted: bool) -> int:
        """Length of the longest chain of additions in an attempt, with promoted values or without."""
        n_blocks, size = self.nu.shape[-2:]
        return accumulation_depth(n_blocks * size, self.window_live.shape[-1], n_blocks, size, promoted)


@struct.dataclass
class Keys:
    """Tier-1 keys as read."""

    scores: jax.Array  # [b, Hkv, G, NB, B], -inf where the block is not read from tier 1
    delta: jax.Array  # [b, Hkv, G, NB, B] Delta_t
    delta_paper: jax.Array  # [b, Hkv, G, NB]
    spectral: jax.Array | None  # [b, Hkv, G, NB] ||q|| sigma_k / sqrt(d)


@struct.dataclass
class Values:
    """Tier-1 values as read. At level 0 nothing is: the centre stands for every value of the block."""

    y: jax.Array  # [b, Hkv, N, d] float32 in the codec's basis, 0 at level 0
    eta: jax.Array  # [b, Hkv, NB, B]
    relative: jax.Array | None  # [b, Hkv, NB] bool, whether the centre is to be added; None is nowhere
    spectral: jax.Array | None  # [b, Hkv, NB] sigma_v

    @property
    def eta_max(self) -> jax.Array:
        """Block maxima of eta: `[b, Hkv, 1, NB]`."""
        return self.eta.max(-1)[:, :, None]


def build(q: jax.Array, cache: TieredKVCache) -> Problem:
    """Score the windows. `q`: `[b, Hkv, G, d]` float32."""
    active, window_live = _visible(cache)  # [b, NB], [b, Nw]
    # where, not a product: a block that is not read may hold anything.
    nu = jnp.where(active[:, None, :, None], nt.read(cache.notes.nu), 0.0)

    shown = window_live[:, None, :, None]
    window_keys = jnp.where(shown, jnp.concatenate([cache.sink_keys, cache.ring_keys], 2).astype(jnp.float32), 0.0)
    window_values = jnp.where(
        shown, jnp.concatenate([cache.sink_values, cache.ring_values], 2).astype(jnp.float32), 0.0
    )
    window_scores = jnp.where(window_live[:, None, None], num.dot_scores(q, window_keys), -jnp.inf)
    window_scores = lax.optimization_barrier(window_scores)
    centre = cache.stats.value_centre
    window_nu = jnp.where(
        window_live[:, None], num.norm_up(window_values - centre[:, :, None]) * num.NORM_SLACK, 0.0
    )
    k_norm = jnp.where(active[:, None], cache.notes.k_norm.astype(jnp.float32), 0.0).max(-1)
    if cache.codec.centred:
        k_norm = k_norm + num.norm_up(cache.stats.key_centre)
    k_norm = jnp.maximum(k_norm, num.norm_up(window_keys).max(-1))
    return Problem(
        q=q,
        eps=arithmetic.score_rounding(q, k_norm, turning_error(cache)),
        nu=nu,
        active=active[:, None, None],
        window_scores=window_scores,
        window_values=window_values,
        window_nu=window_nu,
        window_live=window_live,
        nu_max=jnp.maximum(nu.max((-2, -1)), window_nu.max(-1)),
        centre=centre,
    )


def read_keys(problem: Problem, cache: TieredKVCache, level: Level) -> Keys:
    """Score every block with its keys at `level` (static, or `[b, Hkv, NB]`)."""
    q, codec, active = problem.q, cache.codec, problem.active
    b, n_heads, group, d = q.shape
    here = active[:, 0, :, :, None]  # [b, 1, NB, 1]
    k = jnp.where(here[..., None], codec.keys(cache.codes, level), 0.0)
    scores = num.dot_scores(codec.to_basis(q), k.reshape(b, n_heads, -1, d))
    if codec.centred:
        scores = scores + num.dot_scores(q, cache.stats.key_centre[:, :, None])
    scores = scores.reshape(b, n_heads, group, *problem.nu.shape[-2:])
    # Barriers here and below: every use of a score or of a decoded value is of the same float32 number.
    scores = lax.optimization_barrier(jnp.where(active[..., None], scores, -jnp.inf))
    kappa = jnp.where(here, _pick(nt.read(cache.notes.kappa), level, -2), 0.0)
    delta = jnp.where(active[..., None], score_delta(q, codec, cache.codes, kappa), 0.0)
    spectral = None
    if cache.notes.sigma_k is not None:
        sigma = _pick(cache.notes.sigma_k.astype(jnp.float32), level, -1)
        spectral = jnp.where(active, spectral_coefficient(q, sigma), 0.0)
    return Keys(
        scores=scores,
        delta=delta,
        delta_paper=jnp.where(active, paper_delta(q, codec, cache.codes, delta), 0.0),
        spectral=spectral,
    )


def read_values(problem: Problem, cache: TieredKVCache, level: Level) -> Values:
    """Decode every block's values at `level` (static, or `[b, Hkv, NB]`): 0 is the centre alone, 1 the codec's
    coarsest."""
    codec, notes = cache.codec, cache.notes
    here = problem.active[:, 0]  # [b, 1, NB]
    some = here & (jnp.asarray(level) > 0)
    y = codec.values(cache.codes, level - 1 if isinstance(level, int) else jnp.maximum(level - 1, 0))
    y = lax.optimization_barrier(jnp.where(some[..., None, None], y, 0.0))
    b, n_heads, _, _, d = y.shape
    eta = jnp.concatenate([problem.nu[..., None, :], nt.read(notes.eta)], -2)
    spectral = None
    if notes.sigma_v is not None:
        spectral = jnp.where(here, _pick(notes.sigma_v.astype(jnp.float32), level, -1), 0.0)
    relative = None
    if codec.centred or not isinstance(level, int):
        relative = jnp.broadcast_to(here if codec.centred else here & ~some, problem.nu.shape[:-1])
    return Values(
        y=y.reshape(b, n_heads, -1, d),
        eta=jnp.where(here[..., None], _pick(eta, level, -2), 0.0),
        relative=relative,
        spectral=spectral,
    )


def turning_error(cache: TieredKVCache) -> float:
    """Relative error of a vector turned into the codec's basis or out of it, with the centre's part added."""
    return cache.codec.rounding(cache.head_dim) + 4 * num.U if cache.codec.centred else 0.0


def spectral_coefficient(q: jax.Array, sigma: jax.Array) -> jax.Array:
    """`||q|| sigma / sqrt(d)`, rounded up. `sigma`: [b, Hkv, NB] -> [b, Hkv, G, NB]."""
    return num.norm_up(q)[..., None] * sigma[:, :, None] * (q.shape[-1] ** -0.5 * num.NORM_SLACK)


def _pick(x: jax.Array, level: Level, axis: int) -> jax.Array:
    """The level of each block along `axis`."""
    if isinstance(level, int):
        return jnp.take(x, level, axis)
    # A chain of selects rather than a gather: it fuses with what reads it.
    picked = jnp.take(x, 0, axis)
    for i in range(1, x.shape[axis]):
        at = level == i
        picked = jnp.where(at if axis == -1 else at[..., None], jnp.take(x, i, axis), picked)
    return picked


def _visible(cache: TieredKVCache) -> tuple[jax.Array, jax.Array]:
    """Which blocks are read from tier 1 and which window tokens hold: `[b, NB]`, `[b, S + R*B]` bool.

    Every token of the sequence is in exactly one of tier 1, sink and ring.
    """
    size, length = cache.block_size, cache.length[:, None]
    last = (length - 1) // size
    first_in_ring = last - cache.ring_blocks + 1
    n_sink = cache.sink_keys.shape[-2]
    block = jnp.arange(cache.n_blocks)
    active = (block >= n_sink // size) & (block < first_in_ring)

    token = jnp.arange(n_sink)
    sink = (token < length) & (token // size < first_in_ring)
    slot = jnp.arange(cache.ring_blocks * size)
    held = ring_block_index(cache.length, cache.ring_blocks, size)[:, slot // size]
    ring = (held >= 0) & (held * size + slot % size < length)
    return active, jnp.concatenate([sink, ring], -1)
