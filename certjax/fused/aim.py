"""How closely the plans of a layer aim at the tolerance: what came of one step's plan corrects the next one's.

A plan is made before values are read, on an estimate of how long the output will be. How far off that is depends on the
layer more than on the token: on a text, the bounds of some layers come to 0.7 of what was planned for at most steps,
and those of others to 1.4. A layer whose bound exceeded its tolerance, and went dense, aims lower at once; one whose
bound held aims a little higher, the more the less of its tolerance was used, so that about one step in a hundred
exceeds it. None of this enters a bound.
"""

from __future__ import annotations

import jax.numpy as jnp

from certjax.cache import TieredKVCache
from certjax.certificate import Certificate
from certjax.fused.ladder import allotted
from certjax.policy import Policy

LOWEST, HIGHEST = 0.25, 2.0
RISE, LEAST_RISE = 0.008, 0.0005
"""Of the share of the tolerance that was left, by how much of it the aim rises; and at least by so much."""
TARGET = 0.85
"""Of the tolerance: what a plan that has exceeded it aims at next."""
ABSURD = 2.5
"""Times the tolerance: a bound this large is not a plan that missed, but a head that was given up."""


def corrected(cache: TieredKVCache, policy: Policy, certificate: Certificate) -> TieredKVCache:
    """The cache after a step of all layers with this certificate, leaves `[L, b, Hq]`."""
    if policy.tolerance is None:
        return cache
    shape = cache.aim.shape

    def rows(x):  # [L, b, Hq] -> [L b, Hq, 1]
        return x.reshape(-1, x.shape[-1], 1)

    bound = rows(certificate.e_total_candidate)
    used = (bound / allotted(policy, rows(certificate.out_norm_candidate), bound)).max((1, 2)).reshape(shape)
    lower = cache.aim * (TARGET / jnp.clip(used, 1.0, ABSURD))
    higher = cache.aim * (1 + jnp.maximum(RISE * (0.95 - used), LEAST_RISE))
    aim = jnp.where(used <= 1, higher, jnp.where(used <= ABSURD, lower, cache.aim))
    return cache.replace(aim=jnp.clip(aim, LOWEST, HIGHEST))
