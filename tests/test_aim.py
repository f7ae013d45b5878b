"""What a plan that missed teaches the next one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from certjax import Policy, TieredKVCache
from certjax.certificate import empty_certificate
from certjax.fused import aim
from tests.problems import certify

pytestmark = pytest.mark.usefixtures("quick_compilation")

L, B, HQ = 2, 2, 4
POLICY = Policy.budget(0.05, block_size=128)


def cache_of(policy=POLICY):
    keys = jnp.zeros((L, B, 1, 256, 64), jnp.bfloat16)
    return TieredKVCache.from_prefill(keys, keys, policy)


def after(used, steps=1, policy=POLICY, start=None):
    """The aim `[L, B]` after steps in which bounds came to `used` `[L, B]` of the tolerance."""
    cache = cache_of(policy)
    if start is not None:
        cache = cache.replace(aim=jnp.full((L, B), start))
    bound = jnp.broadcast_to(0.05 * 3.0 * jnp.asarray(used)[..., None], (L, B, HQ))
    record = empty_certificate((L, B, HQ)).replace(
        out_norm_candidate=jnp.full((L, B, HQ), 3.0), e_total_candidate=bound.astype(jnp.float32)
    )
    for _ in range(steps):
        cache = aim.corrected(cache, policy, record)
    return np.asarray(cache.aim)


def test_what_exceeded_its_tolerance_aims_lower_at_once():
    got = after([[0.9, 1.1], [1.7, 2.4]])
    np.testing.assert_allclose(got[0, 0], 1 + max(aim.RISE * 0.05, aim.LEAST_RISE), rtol=1e-5)
    np.testing.assert_allclose(got[0, 1], aim.TARGET / 1.1, rtol=1e-3)
    np.testing.assert_allclose(got[1], [aim.TARGET / 1.7, aim.TARGET / 2.4], rtol=1e-3)


def test_heads_that_gave_up_and_what_is_not_a_number_teach_nothing():
    np.testing.assert_array_equal(after([[6.0, np.inf], [np.nan, 2.6]]), np.ones((L, B)))


def test_aim_stays_between_its_ends():
    assert (after(np.full((L, B), 0.5), steps=250) == aim.HIGHEST).all()
    assert (after(np.full((L, B), 2.0), steps=5) == aim.LOWEST).all()


def test_aim_follows_a_layer_and_a_policy_without_a_tolerance_has_none():
    cache = cache_of().replace(aim=jnp.array([[1.0, 2.0], [3.0, 4.0]]))
    np.testing.assert_array_equal(cache.at(jnp.int32(1)).aim, [3.0, 4.0])
    assert cache.at(jnp.int32(0)).stacked().aim.shape == (1, B)
    assert (after(np.full((L, B), 2.0), policy=Policy.observe(block_size=128)) == 1).all()


def test_a_lower_aim_reads_more():
    """On a layer of its own: the plan keeps to the share of the tolerance that the cache names."""
    policy = Policy.budget(0.4, block_size=128, backend="reference")
    a, b, c = jax.random.split(jax.random.key(0), 3)
    q, keys, values = jax.random.normal(a, (1, 4, 64)), *(jax.random.normal(k, (1, 2, 1536, 64)) for k in (b, c))
    cache = TieredKVCache.from_prefill(keys.astype(jnp.bfloat16), (values + 0.5).astype(jnp.bfloat16), policy)
    read, bound = [], []
    for value in (1.0, 0.7, 0.4):
        _, record = certify(q, cache.replace(aim=jnp.full(1, value)), policy)
        read.append(float(record.bytes_read.sum()))
        bound.append(float(jnp.sqrt(jnp.square(record.e_total).mean() / jnp.square(record.out_norm).mean())) / 0.4)
    assert read == sorted(read) and len(set(read)) == 3
    assert bound == sorted(bound, reverse=True) and bound[2] < 0.5
