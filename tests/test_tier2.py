"""Tier 2 on the device, `Policy.tier2`: sequences, heads and blocks are handled at once, and all comes out the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from certjax import MissingTier2Error, Policy, TieredKVCache, certified_attention, dense_attention, host
from tests import problems
from tests.oracle import exact_error, f64
from tests.problems import certify

pytestmark = pytest.mark.usefixtures("quick_compilation")

POLICIES = {
    "paper": Policy.paper(k_max=12, v_tol=0.01, exploration=0.2),
    "budget": Policy.budget(0.02, exploration=0.2),
}
COUNTS = (
    "rung", "k_star", "n_value_promoted", "n_value_skipped", "bytes_read", "bytes_paged_in", "canary_ok", "ranking_ok",
    "boundary_ok", "precondition_ok",
)  # fmt: skip
BOUNDS = ("e_total", "e_total_candidate", "e_key", "e_val", "tolerance")


def on_device(policy: Policy) -> Policy:
    return dataclasses.replace(policy, tier2="device")


@pytest.mark.parametrize("name", POLICIES)
def test_outputs_and_certificates_are_those_of_host_memory(name):
    policy = POLICIES[name]
    q, *originals = problems.originals()
    (out, record), (expected, told) = (certify(q, problems.cache(p), p) for p in (on_device(policy), policy))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    for field in COUNTS:
        np.testing.assert_array_equal(getattr(record, field), getattr(told, field), field)
    for field in BOUNDS:
        np.testing.assert_allclose(getattr(record, field), getattr(told, field), rtol=1e-4, err_msg=field)
    assert (exact_error(out, q, *originals) <= f64(record.e_total)).all()
    assert record.bytes_paged_in.any() and record.rung.any()


def test_originals_that_are_not_numbers_matter_where_they_are_read_and_nowhere_else():
    policy = on_device(Policy.paper(k_max=4, v_tol=1e9))  # reads keys of a few blocks, and no values

    @jax.jit
    def broken(cache):
        keys, values = cache.host_keys.at[0, 0, :32].set(jnp.nan), cache.host_values.at[1].set(jnp.nan)
        return cache.replace(host_keys=keys, host_values=values)

    q, *_ = problems.originals()
    out, record = certify(q, broken(problems.cache(policy)), policy)
    assert np.isnan(out[0]).any() and (record.rung[0] == 4).all()
    assert np.isfinite(out[1]).all() and np.isfinite(record.e_total[1]).all()


def test_fused_kernels_read_originals_wherever_they_are():
    policy = on_device(Policy.budget(0.05, block_size=128, backend="reference", sink_tokens=0, recent_tokens=0))
    q, keys, values = (
        jax.random.normal(jax.random.key(i), (1, *shape, 64), jnp.bfloat16)
        for i, shape in enumerate([(8,), (2, 512), (2, 512)])
    )
    lengths = jnp.asarray([512])
    cache = problems.build(keys, values, lengths, policy)
    out, record = certify(3 * q, cache, policy)
    assert (exact_error(out, 3 * q, keys, values, lengths) <= f64(record.e_total)).all()
    assert record.bytes_paged_in.any() and record.canary_ok.all()


@pytest.mark.parametrize(("policy", "stacked"), [(Policy.paper(), False), (Policy.budget(), True)],
                         ids=["paper, one layer", "budget, stacked"])  # fmt: skip
def test_caches_grow_alike_to_the_bit(policy, stacked):
    """Blocks are opened and closed in the rows at different steps; one row is full before the end."""
    _, keys, values, _ = problems.originals()
    keys, values = (x[:, :, :96] for x in (keys, values))
    if stacked:
        keys, values = jnp.stack([keys, values]), jnp.stack([values, keys])
    lengths = jnp.asarray([96 - 20, 41])

    def grown(policy):
        cache = TieredKVCache.from_prefill(keys, values, policy, lengths=lengths, capacity=96)

        def step(i, cache):
            k, v = (jax.random.normal(jax.random.key(2 * i + j), cache.ring_keys.shape[-4:-2] + (32,)) for j in (0, 1))
            for layer in (0, 1) if stacked else (None,):
                cache = cache.write(k, v, layer)
            return cache.advance()

        return lax.fori_loop(0, 24, step, cache)

    of_device, of_host = (jax.jit(lambda p=p: grown(p))() for p in (on_device(policy), policy))
    assert (of_device.tier2, of_host.tier2) == ("device", "host")
    jax.tree.map(np.testing.assert_array_equal, of_device.replace(tier2="host"), of_host)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_originals_are_on_the_device_bit_for_bit(dtype):
    _, keys, values, _ = problems.originals(dtype)
    whole = jnp.full(problems.B, problems.N)
    cache = problems.build(keys, values, whole, on_device(Policy.paper()))
    cache.require_tier2()
    np.testing.assert_array_equal(cache.host_keys, keys)
    np.testing.assert_array_equal(cache.host_values, values)
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(cache)}
    assert kinds == {jax.devices()[0].default_memory().kind}


def test_heads_that_go_dense_are_dense_attention():
    policy = on_device(Policy.budget(0.3, "head", codec="int8_int4", max_promoted=0.3))
    q, *originals = problems.originals()
    cache = problems.cache(policy)
    out, record = certify(q, cache, policy)
    dense = np.asarray(record.rung) == 3
    assert dense.any() and not dense.all()
    alone = jax.jit(dense_attention)(q, cache)
    np.testing.assert_array_equal(np.asarray(out)[dense], np.asarray(alone)[dense])
    assert (exact_error(alone, q, *originals)[dense] <= f64(record.e_total)[dense]).all()


@pytest.mark.parametrize("name", ["host_keys", "host_values"])
def test_originals_that_moved_to_the_host_are_refused(name):
    policy = on_device(Policy.paper())
    q, cache = problems.originals()[0], problems.cache(policy)
    moved = cache.replace(**{name: jax.device_put(getattr(cache, name), host.Space.Host)})
    with pytest.raises(MissingTier2Error, match=rf"{name} is in pinned_host.*tier2='device'.*Space\.Device"):
        certified_attention(q, moved, policy)
