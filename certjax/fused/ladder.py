"""Who goes dense: the contract, that a returned head-step keeps its tolerance or is dense, decided in one go."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from certjax.fused.bound import no_nan
from certjax.policy import Policy


def allotted(policy: Policy, norm: jax.Array, e_total: jax.Array) -> jax.Array:
    """The tolerance of each head, as `certjax.ladder.allotted`, from norms of outputs. `[b, Hkv, G]` each.

    Pooled, the bounds are scaled to the root mean square that is allowed.
    """
    if policy.tolerance is None:
        return jnp.full(norm.shape, jnp.inf)
    if policy.relative_to == "absolute":
        return jnp.full(norm.shape, policy.tolerance)
    if policy.relative_to == "head":
        return jnp.where(jnp.isfinite(norm), policy.tolerance * norm, 0.0)
    layer = policy.tolerance * _root_mean_square(norm)
    layer = jnp.where(jnp.isfinite(layer), layer, 0.0)
    if not policy.pooled:
        return jnp.broadcast_to(layer, norm.shape)
    rms = _root_mean_square(e_total)
    usable = (rms > 2.0**-100) & (rms < 2.0**100)
    shares = e_total / jnp.where(usable, rms, 1.0)
    return jnp.where(usable, layer * shares, jnp.where(rms == 0, layer, 0.0))


def _root_mean_square(x: jax.Array) -> jax.Array:
    """Over a row, of numbers whose squares may overflow or vanish, in one pass."""
    far = 2.0**80
    squares, lifted, lowered = (jnp.square(x * by).mean((1, 2), keepdims=True) for by in (1.0, far, 1 / far))
    tiny, huge = squares < 2.0**-60, ~(squares < 2.0**120)
    return jnp.where(tiny, jnp.sqrt(lifted) / far, jnp.where(huge, jnp.sqrt(lowered) * far, jnp.sqrt(squares)))


def heads_to_give_up(policy: Policy, norm: jax.Array, e_total: jax.Array, gone: jax.Array) -> jax.Array:
    """KV heads to make dense so that the tolerance holds for what is left: `[b, Hkv]` bool.

    The heads with the largest bounds go first. How long dense outputs will be is not known yet: only the norms of those
    that stay are counted, so that the contract holds whatever dense attention returns.

    Parameters
    ----------
    norm, e_total : `[b, Hkv, G]`
    gone : `[b, Hkv]` bool
        Heads that are dense already.
    """
    if policy.tolerance is None:
        return gone
    own = jnp.where(gone[..., None], jnp.inf, no_nan(e_total))
    if policy.relative_to != "layer":
        return gone | (~(own <= allotted(policy, norm, own))).any(-1)
    # In units of the longest output, so that no square overflows or vanishes.
    unit = jnp.clip(norm.max((1, 2), keepdims=True), 2.0**-100, 2.0**100)
    own, norm = own / unit, norm / unit
    worst = own.max(-1)  # [b, Hkv]
    place = jnp.arange(worst.shape[-1])
    ahead = worst[:, None] > worst[:, :, None]
    ahead |= (worst[:, None] == worst[:, :, None]) & (place[None, :] < place[:, None])
    rank = ahead.sum(-1)  # 0: the largest bound
    stays = rank[:, None] >= jnp.arange(worst.shape[-1] + 1)[:, None]  # [b, n, Hkv]: with the n worst dense
    group = norm.shape[-1]
    kept_norm = jnp.where(stays, jnp.square(norm).sum(-1)[:, None], 0.0).sum(-1)  # [b, n]
    if policy.pooled:
        bounds = jnp.where(stays, jnp.square(own).sum(-1)[:, None], 0.0).sum(-1)
    else:
        bounds = jnp.square(jnp.where(stays, worst[:, None], 0.0).max(-1)) * (group * worst.shape[-1])
    # A little is held back for the rounding of the sums, which `allotted` evaluates in another order.
    fits = (bounds <= policy.tolerance**2 * (1 - 2.0**-14) * kept_norm) & (kept_norm < jnp.inf)
    fits |= ~stays.any(-1)
    return gone | (rank < jnp.argmax(fits, -1)[:, None])
