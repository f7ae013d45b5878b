"""Fault injection: each fault is caught by the check that owns it, and the output is right all the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from certjax import Policy, TieredKVCache, decode
from certjax.models.llama.modeling import init_params
from tests import problems
from tests.oracle import exact_error, f64
from tests.problems import certify
from tests.test_fused import small_model

pytestmark = pytest.mark.usefixtures("quick_compilation")

BLOCK = (0, 0, 3)
"""Sequence, KV head and block that the faults hit."""

WATCHFUL = dict(scrub=1, sink_tokens=0, recent_tokens=32)
PLAIN = dict(codec="int8_int4", annotations="bfloat16")
POLICIES = {
    "budget": Policy.budget(1.0, **WATCHFUL, **PLAIN),
    "paper": Policy.paper(scrub=1),
}
UNSCRUBBED = {
    # A tolerance so loose that tier 1 is read rather than replaced.
    "budget": dataclasses.replace(POLICIES["budget"], scrub=0, skip_values=False, tolerance=100.0),
    "paper": dataclasses.replace(POLICIES["paper"], scrub=0),
}
policies = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


def damage(cache, tree, leaf, change):
    x = getattr(getattr(cache, tree), leaf)
    return cache.replace(**{tree: getattr(cache, tree).replace(**{leaf: change(x)})})


def certified(cache, policy):
    """Error and record; the error is taken against the undamaged originals."""
    q, keys, values, lengths = problems.originals()
    out, record = certify(q, cache, policy)
    return exact_error(out, q, keys, values, lengths), record


def assert_whole_layer_is_dense(error, record):
    assert (np.asarray(record.rung[0]) == 4).all()
    assert (np.asarray(record.rung[1]) < 3).any()  # the other sequence of the batch is not touched
    assert (error <= f64(record.e_total)).all() and error[0].max() < 1e-5


@policies
def test_intact_cache_passes_every_check(policy):
    error, record = certified(problems.cache(policy), policy)
    assert np.asarray(record.precondition_ok & record.canary_ok).all()
    assert (np.asarray(record.rung) < 4).all()


FAULTS = {
    "corrupt scale": ("codes", "k_scale", lambda x: x.at[BLOCK].multiply(1.5)),
    "corrupt offset": ("codes", "k_zero", lambda x: x.at[BLOCK].add(0.25)),
    "flipped key code": ("codes", "k_codes", lambda x: x.at[(*BLOCK, 5, 7)].set(~x[(*BLOCK, 5, 7)])),
    "flipped value code": ("codes", "v_codes", lambda x: x.at[(*BLOCK, 5, 7)].set(~x[(*BLOCK, 5, 7)])),
    "corrupt value scale": ("codes", "v_scale", lambda x: x.at[(*BLOCK, 2)].multiply(2)),
    "stale kappa": ("notes", "kappa", lambda x: x.at[BLOCK].multiply(0.25)),
    "stale eta": ("notes", "eta", lambda x: x.at[BLOCK].multiply(0.25)),
    "stale nu": ("notes", "nu", lambda x: x.at[BLOCK].multiply(0.25)),
    "stale key norm": ("notes", "k_norm", lambda x: x.at[BLOCK].multiply(0.25)),
    "two blocks swapped": ("codes", "k_codes", lambda x: x.at[0, 0, 3].set(x[0, 0, 4]).at[0, 0, 4].set(x[0, 0, 3])),
}


@policies
@pytest.mark.parametrize("fault", FAULTS)
def test_fingerprint_catches_damage_and_the_layer_goes_dense(policy, fault):
    error, record = certified(damage(problems.cache(policy), *FAULTS[fault]), policy)
    assert not np.asarray(record.precondition_ok[0, :3]).any()  # the damaged KV head's group
    assert np.asarray(record.precondition_ok[1]).all()
    assert_whole_layer_is_dense(error, record)


@pytest.mark.parametrize(
    "fault", ["corrupt scale", "corrupt offset", "stale kappa", "stale eta", "flipped value code", "two blocks swapped"]
)
def test_canary_catches_what_the_fingerprint_does_not_look_at(fault):
    """Scrubbing off: original keys and values of every block are read and compared with what tier 1 says."""
    policy = Policy.paper(scrub=0, k_min=64, k_max=64, tau_cov=1.0, v_tol=0.0)
    error, record = certified(damage(problems.cache(policy), *FAULTS[fault]), policy)
    assert not np.asarray(record.canary_ok[0]).all() and np.asarray(record.canary_ok[1]).all()
    assert np.asarray(record.precondition_ok).all()
    assert_whole_layer_is_dense(error, record)


def test_exploration_catches_damage_in_a_block_nobody_promotes():
    """A quarter of all blocks is explored a step: over the steps the damaged one is among them."""
    policy = Policy.budget(1e9, "absolute", scrub=0, exploration=0.25, recent_tokens=32, sink_tokens=0, **PLAIN)
    q, keys, values, _ = problems.originals()
    caught = []
    for n in range(481, 497):  # the draw depends on the step, that is, on the length
        cache = damage(problems.build(keys, values, jnp.full(2, n), policy), *FAULTS["corrupt scale"])
        record = certify(q, cache, policy)[1]
        caught.append(not np.asarray(record.canary_ok[0]).all())
        assert not np.asarray(record.k_star).any() and int(record.bytes_paged_in.sum()) > 0
    assert 0 < sum(caught) < len(caught)


def test_scrubbing_reaches_every_block_within_its_period():
    policy = Policy.budget(1e9, "absolute", scrub=8, sink_tokens=0, recent_tokens=0, **PLAIN)
    q, keys, values, _ = problems.originals()
    found = []
    for n in range(480, 488):
        cache = problems.build(keys, values, jnp.full(2, n), policy)
        record = certify(q, damage(cache, *FAULTS["flipped key code"]), policy)[1]
        found.append(not bool(record.precondition_ok[0].all()))
    assert sum(found) == 1


@policies
@pytest.mark.parametrize("leaf", ["k_scale", "k_zero", "v_scale", "v_zero"])
def test_nan_in_metadata_takes_the_layer_to_dense(policy, leaf):
    policy = UNSCRUBBED[policy.kind]
    cache = damage(problems.cache(policy), "codes", leaf, lambda x: x.at[BLOCK].set(jnp.nan))
    error, record = certified(cache, policy)
    assert not np.asarray(record.precondition_ok[0]).all()
    assert_whole_layer_is_dense(error, record)


@policies
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_key_in_the_originals_is_never_certified(policy, bad):
    q, keys, values, lengths = problems.originals()
    cache = problems.build(keys.at[0, 0, 50, 3].set(bad), values, lengths, policy)
    out, record = certify(q, cache, policy)
    assert (np.asarray(record.rung[0]) == 4).all()
    assert not np.asarray(record.precondition_ok[0, :3]).any()
    # Heads that attend to it have no bound; a score of minus infinity is a weight of zero, which has one.
    hit = np.isnan(np.asarray(out[0, :3])).any(-1)
    assert hit.any() and np.isinf(np.asarray(record.e_total[0, :3]))[hit].all()
    assert np.isfinite(np.asarray(record.e_total[0, 3:])).all() and np.isfinite(np.asarray(record.e_total[1])).all()


def test_annotation_that_claims_infinity_makes_heads_dense_not_wrong():
    policy = UNSCRUBBED["budget"]
    cache = damage(problems.cache(policy), "notes", "kappa", lambda x: x.at[BLOCK].set(jnp.inf))
    error, record = certified(cache, policy)
    assert (error <= f64(record.e_total)).all()
    assert (np.asarray(record.rung[0, :3]) >= 1).all()


def test_ranking_check_fails_when_codes_hide_the_heaviest_block():
    """Quantization that reorders the top block is seen by the ranking check, and the head goes dense."""
    policy = Policy.paper(scrub=0, canary=False, k_min=8, k_max=8)
    q, keys, values, lengths = problems.originals(query_scale=3.0)
    cache = problems.cache(policy)
    # Lift one block's scores by an offset of its keys along the query, unknown to the annotations.
    lifted = damage(cache, "codes", "k_zero", lambda x: x.at[0, 0, 7].add(q[0, 0] * 0.6))
    _, record = certify(q, lifted, policy)
    assert not bool(record.ranking_ok[0, 0]) and int(record.rung[0, 0]) == 3


def test_boundary_check_fails_when_a_block_left_behind_could_be_the_heaviest():
    policy = Policy.paper(k_min=1, k_max=1, rung1_multiplier=1.0)
    q, *_ = problems.originals(query_scale=0.05)  # nearly flat: any block may be the heaviest
    _, record = certify(q, problems.cache(policy), policy)
    failed = ~np.asarray(record.boundary_ok)
    assert failed.any() and (np.asarray(record.rung)[failed] == 3).all()


def grown(cache):
    """Under jit, where a cache that is full cannot refuse a token."""
    k = jnp.ones((*cache.ring_keys.shape[:-2], cache.head_dim), cache.ring_keys.dtype)
    return jax.jit(lambda c: c.append(k, k))(cache)


@policies
def test_token_without_a_place_fails_its_sequence(policy):
    cache = grown(problems.cache(policy))  # the first sequence is full, the second is not
    _, record = certify(problems.originals()[0], cache, policy)
    assert not np.asarray(record.precondition_ok[0]).any() and (np.asarray(record.rung[0]) == 4).all()
    assert np.asarray(record.precondition_ok[1]).all() and (np.asarray(record.rung[1]) < 4).all()


def test_token_without_a_place_fails_its_sequence_in_kernels_and_in_a_decode_step():
    policy = Policy.budget(0.5, block_size=128, backend="reference")
    config = dataclasses.replace(small_model().config, dtype="float32")
    keys = jax.random.normal(jax.random.key(1), (2, 2, 2, 512, 64)).astype(jnp.bfloat16)
    cache = TieredKVCache.from_prefill(keys, keys[::-1], policy, lengths=jnp.array([511, 512]), capacity=512)
    step = jax.jit(lambda p, c: decode.step(config, "certified", policy, p, c, jnp.zeros(2, jnp.int32))[1:])
    params, fine = init_params(config, jax.random.key(0)), []
    for _ in range(2):
        cache, certificate = step(params, cache)
        fine.append(np.asarray(certificate.precondition_ok).all((0, 2)).tolist())
    assert fine == [[True, False], [False, False]]
    alone = TieredKVCache.from_prefill(keys[0], keys[1], policy, lengths=jnp.array([511, 512]), capacity=512)
    q = jax.random.normal(jax.random.key(2), (2, 4, 64))
    _, record = certify(q, grown(alone), policy)
    assert np.asarray(record.precondition_ok).all(1).tolist() == [True, False]
