"""What each block would add to the bound at each precision: estimates that selection weighs against bytes.

Everything here is per block and follows from one pass over the keys at their coarsest level. It decides what is read
and nothing else: what was read is certified afterwards from the annotations token by token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from certjax.bounds.spectral import second_order
from certjax.cache import TieredKVCache
from certjax.codecs import notes as nt
from certjax.reading import Keys, Problem, spectral_coefficient
from pallas_kernels import numerics as num
from pallas_kernels.attend.reference import Weights


@struct.dataclass
class Scan:
    """One pass over the keys at their coarsest level, with every value taken for the centre."""

    p: jax.Array  # [b, Hkv, G, NB, B] normalised weights
    delta: jax.Array  # [b, Hkv, G, NB, B]
    out: jax.Array  # [b, Hkv, G, d] the windows' part, and the centre for the rest
    offset: jax.Array  # [b, Hkv, G] an estimate of ||c - O^||


def scan(problem: Problem, keys: Keys, w: Weights) -> Scan:
    """First look at a step. `w`: numerators for `keys`."""
    p = w.tier1 / w.total[..., None, None]
    pw = w.window / w.total[..., None]
    centre = problem.centre[:, :, None]
    from_centre = num.weighted_sum(pw, problem.window_values - problem.centre[:, :, None])
    # What lies outside the windows moves the output by no more than its mean distance; half of it is a fair guess.
    rest = 0.5 * (p * problem.nu[:, :, None]).sum((-2, -1))
    return Scan(
        p=p,
        delta=keys.delta,
        out=from_centre + centre,
        offset=jnp.hypot(num.norm_up(from_centre), rest),
    )


def key_terms(problem: Problem, cache: TieredKVCache, seen: Scan, offset: jax.Array) -> list[jax.Array]:
    """What a block adds to E_key at each key level and with original keys (0): `[b, Hkv, G, NB]` each."""
    px = seen.p * (problem.nu[:, :, None] + offset[..., None, None])
    mean, norm = px.sum(-1), num.norm_up(px)
    coarse = (px * jnp.expm1(seen.delta)).sum(-1)
    peaks = nt.block_peak(cache.notes.kappa)[:, :, None]  # [b, Hkv, 1, NB, Lk]
    terms = []
    for level in range(cache.codec.key_levels):
        term = coarse * _ratio(peaks[..., level], peaks[..., 0])
        if cache.notes.sigma_k is not None:
            delta = seen.delta.max(-1) * _ratio(peaks[..., level], peaks[..., 0])
            coefficient = spectral_coefficient(problem.q, cache.notes.sigma_k[..., level].astype(jnp.float32))
            term = jnp.minimum(term, coefficient * norm + mean * second_order(delta))
        terms.append(term)
    return _settle(problem, [*terms, jnp.zeros_like(mean)])


def value_terms(problem: Problem, cache: TieredKVCache, seen: Scan, *, skip: bool) -> list[jax.Array]:
    """What a block adds to E_val with the centre in place of its values, at each value level, and with original
    values (0): `[b, Hkv, G, NB]` each. Without `skip` the centre is out of the question."""
    mass, norm = seen.p.sum(-1), num.norm_up(seen.p)
    skipped = (seen.p * problem.nu[:, :, None]).sum(-1)
    peak = nt.block_peak(cache.notes.nu)[:, :, None]  # [b, Hkv, 1, NB]
    finer = nt.block_peak(cache.notes.eta)[:, :, None]  # [b, Hkv, 1, NB, Lv]
    terms = [skipped]
    for level in range(cache.codec.value_levels):
        terms.append(jnp.minimum(mass * finer[..., level], skipped * _ratio(finer[..., level], peak)))
    if cache.notes.sigma_v is not None:
        sigma = cache.notes.sigma_v.astype(jnp.float32)[:, :, None]
        terms = [jnp.minimum(t, norm * sigma[..., i]) for i, t in enumerate(terms)]
    if not skip:
        terms[0] = jnp.full_like(mass, jnp.inf)
    return _settle(problem, [*terms, jnp.zeros_like(mass)])


def _ratio(fine: jax.Array, coarse: jax.Array) -> jax.Array:
    """How much smaller the residuals of a block are at a finer level, by their peaks: tokens are taken to shrink
    alike."""
    return jnp.where(coarse > 0, fine / jnp.where(coarse > 0, coarse, 1.0), 1.0)


def _settle(problem: Problem, terms: list[jax.Array]) -> list[jax.Array]:
    """0 where nothing is read from tier 1, infinity for what is not a number."""
    terms = [jnp.where(jnp.isnan(t), jnp.inf, t) for t in terms]
    return [jnp.where(problem.active, t, 0.0) for t in terms]
