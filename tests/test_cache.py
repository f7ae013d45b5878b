import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from certjax import (
    ContextLengthError,
    InvalidArgumentError,
    MissingTier2Error,
    Policy,
    TieredKVCache,
    certified_attention,
    host,
)
from certjax.costs import read_costs

B, H, N, D = 2, 3, 96, 32
POLICY = Policy.budget(0.05, codec="int8_int4", sink_tokens=16, recent_tokens=32, centre="zero")
BARE = Policy.paper()
PLANES = Policy.budget(0.05, sink_tokens=16, recent_tokens=32, centre="zero")
FP8 = Policy.observe(codec="fp8_e4m3", sink_tokens=0, recent_tokens=16, centre="zero")


def kv(dtype=jnp.float16, n=N, batch=B):
    k1, k2 = jax.random.split(jax.random.key(0))
    return jax.random.normal(k1, (batch, H, n, D), dtype), jax.random.normal(k2, (batch, H, n, D), dtype)


@functools.partial(jax.jit, static_argnames=("policy", "capacity"))
def build(keys, values, lengths, policy=POLICY, capacity=N):
    return TieredKVCache.from_prefill(keys, values, policy, lengths=lengths, capacity=capacity)


@functools.partial(jax.jit, donate_argnums=0)
def append(cache, k, v):
    return cache.append(k, v)


def grown(keys, values, start, steps, policy):
    """A cache prefilled to `start` and grown token by token."""
    cache = build(keys, values, jnp.asarray(start), policy)
    for t in range(steps):
        at = [n + t for n in start]
        cache = append(cache, *(jnp.stack([x[r, :, n] for r, n in enumerate(at)]) for x in (keys, values)))
    return cache


def assert_same(a, b):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    "policy", [POLICY, BARE, pytest.param(PLANES, marks=pytest.mark.smoke)], ids=["int8_int4", "paper", "planes"]
)
@settings(max_examples=4)
@given(st.tuples(st.integers(1, 60), st.integers(1, 60)), st.integers(0, 36))
def test_append_equals_prefill_to_the_bit(policy, start, steps):
    keys, values = kv()
    whole = build(keys, values, jnp.asarray([n + steps for n in start]), policy)
    step_by_step = grown(keys, values, start, steps, policy)
    if policy.annotations == "byte":  # measured by another program, a share may come out one step higher
        for name in ("kappa", "eta", "nu"):
            ours, theirs = (np.asarray(getattr(c.notes, name).share, int) for c in (step_by_step, whole))
            assert np.abs(ours - theirs).max() <= 1
        step_by_step, whole = (c.replace(notes=(c.notes.k_norm, c.notes.sigma_k)) for c in (step_by_step, whole))
    assert_same(step_by_step, whole)


@pytest.mark.parametrize(("codec", "read"), [("planes", True), ("int8_int4", False), ("fp8_e4m3", False)])
def test_mean_of_the_keys_is_kept_where_the_codec_reads_it(codec, read):
    keys, values = kv()
    stats = build(keys + 1, values + 1, jnp.asarray([N, 50]), Policy.budget(0.05, codec=codec, centre="mean")).stats
    assert bool((stats.key_centre != 0).all()) is read and bool((stats.key_centre != 0).any()) is read
    assert bool((stats.value_centre != 0).all())  # distances from it annotate every codec


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_tier2_holds_the_originals_bit_for_bit(dtype):
    keys, values = kv(dtype)
    cache = build(keys, values, jnp.asarray([N, 50]))
    assert cache.host_keys.dtype == dtype
    np.testing.assert_array_equal(np.asarray(cache.host_keys[0]), np.asarray(keys[0]))
    np.testing.assert_array_equal(np.asarray(cache.host_values[1, :, :50]), np.asarray(values[1, :, :50]))


@pytest.mark.smoke
def test_tier2_is_in_pinned_host_memory_where_the_backend_has_it():
    keys, values = kv()
    expected = host.host_memory_kind()
    assert expected == "pinned_host"  # true of the CPU and CUDA back ends the suite runs on
    for cache in (build(keys, values, jnp.asarray([N, N])), TieredKVCache.from_prefill(keys, values, POLICY)):
        assert cache.host_keys.sharding.memory_kind == cache.host_values.sharding.memory_kind == expected
        assert cache.codes.k_codes.sharding.memory_kind != expected


def test_tier2_stays_in_host_memory_through_appends():
    keys, values = kv()
    assert grown(keys, values, [5, 9], 20, POLICY).host_keys.sharding.memory_kind == "pinned_host"


def test_a_block_is_encoded_when_its_last_token_arrives_and_never_again():
    keys, values = kv()
    before, closing = grown(keys, values, [14, 14], 1, BARE), grown(keys, values, [14, 14], 2, BARE)
    assert int(before.notes.checksum[:, :, 0].any()) == 0
    assert bool((closing.notes.checksum[:, :, 0] != 0).all())
    later = grown(keys, values, [14, 14], 30, BARE)
    np.testing.assert_array_equal(later.codes.k_codes[:, :, 0], closing.codes.k_codes[:, :, 0])


def test_appending_leaves_the_old_cache_as_it_was():
    keys, values = kv()
    cache = build(keys, values, jnp.asarray([20, 31]))
    copy = jax.tree.map(np.array, cache)
    jax.jit(lambda c: c.append(keys[:, :, 40], values[:, :, 40]))(cache)
    assert_same(copy, cache)


def test_what_lies_beyond_a_sequence_does_not_matter():
    keys, values = kv()
    lengths = jnp.asarray([20, 33])
    beyond = jnp.arange(N)[None, None, :, None] >= lengths[:, None, None, None]
    poisoned = [jnp.where(beyond, jnp.nan, x) for x in (keys, values)]
    assert_same(build(*poisoned, lengths), build(keys, values, lengths))


def test_byte_report_agrees_with_the_arrays():
    cache = build(*kv(), jnp.asarray([N, N]))
    by_leaf = {
        "tier1": jax.tree.leaves((cache.codes, cache.notes, cache.stats)),
        "windows": [cache.sink_keys, cache.sink_values, cache.ring_keys, cache.ring_values],
        "tier2": [cache.host_keys, cache.host_values],
    }
    assert cache.nbytes() == {name: sum(x.nbytes for x in leaves) for name, leaves in by_leaf.items()}


def shapes_of(policy, d):
    """A cache of 1,600 tokens of one KV head, shapes only."""
    x = jax.ShapeDtypeStruct((1, 1, 1600, d), jnp.float16)
    return jax.eval_shape(lambda k, v: TieredKVCache.from_prefill(k, v, policy, capacity=1600), x, x)


@pytest.mark.parametrize("metadata, expected", [("float32", 288), ("float16", 256)])
def test_tier1_takes_the_bytes_a_token_that_the_format_promises(metadata, expected):
    """At d=128, B=16, g=16: codes and metadata as documented, plus 6 bytes of annotations a token and 8 a block."""
    cache = shapes_of(Policy.paper(key_metadata=metadata), 128)
    codes = host.nbytes(*jax.tree.leaves(cache.codes)) - host.nbytes(cache.codes.k_reach)
    assert codes / 1600 == expected
    annotations = cache.nbytes()["tier1"] - codes - host.nbytes(*jax.tree.leaves(cache.stats))
    assert annotations / 1600 == 6 + 8 / 16


@pytest.mark.parametrize("d, most", [(64, 156), (128, 300)])
def test_planes_stay_within_their_bytes_a_token(d, most):
    """Twelve-bit keys and six-bit values, scales and annotations included, as `docs/formats.md` promises: a byte for
    each of five annotations a token, and per block their peaks, five spectral norms, `k_norm` and the fingerprint."""
    cache = shapes_of(Policy.budget(), d)
    held = cache.nbytes()["tier1"] - host.nbytes(*jax.tree.leaves(cache.stats))
    assert held / 1600 == d * 18 / 8 + 4 + 5 + (10 + 10 + 2 + 4) / 16
    assert held / 1600 <= most


@pytest.mark.parametrize("d", [64, 128])
def test_second_point_holds_less_than_half_of_the_originals(d):
    """Ten-bit keys and four-bit values, read whole: at most 0.47 of the originals' bytes."""
    cache = shapes_of(Policy.budget(key_planes=(8, 2), value_planes=(4,), refine=False), d)
    held = cache.nbytes()["tier1"] - host.nbytes(*jax.tree.leaves(cache.stats))
    assert held / 1600 <= 0.47 * 4 * d


def test_read_costs_at_the_finest_level_are_the_bytes_that_are_held():
    for policy in (Policy.paper(), Policy.observe(), Policy.observe(refine=False), FP8):
        cache = shapes_of(policy, 64)
        costs = read_costs(cache)
        held = cache.nbytes()["tier1"] - host.nbytes(*jax.tree.leaves(cache.stats))
        checksum = 4
        passed_over = 16 * (cache.codec.value_levels - 1)  # bytes of eta at coarser levels than the one that is read
        assert costs.always + costs.keys[-2] + costs.values[-2] + passed_over + checksum == held / 100, policy.codec


def test_stacked_cache_views_equal_single_layer_caches():
    layers = [kv(), tuple(x[::-1] for x in kv())]
    keys, values = (jnp.stack(x) for x in zip(*layers, strict=True))
    lengths = jnp.asarray([40, 17])
    stacked = build(keys, values, lengths)
    for i, (k, v) in enumerate(layers):
        view = stacked.at(jnp.int32(i))
        single = build(k, v, lengths)
        for name in ("codes", "notes", "ring_keys", "sink_values", "stats"):
            assert_same(getattr(view, name), getattr(single, name))
        np.testing.assert_array_equal(
            jax.jit(lambda view: view.page_in_keys(1, 2, 8, 4))(view), k[1, 2, 8:12].astype(jnp.float16)
        )


def test_verify_passes_on_an_intact_cache_and_points_at_a_damaged_block():
    cache = build(*kv(), jnp.asarray([N, N]))
    assert bool(cache.verify().all())
    codes = cache.codes.replace(k_codes=cache.codes.k_codes.at[1, 2, 3, 0, 0].add(1))
    damaged = np.argwhere(~np.asarray(cache.replace(codes=codes).verify()))
    assert damaged.tolist() == [[1, 2, 3]]


def test_full_cache_refuses_another_token():
    keys, values = kv()
    cache = build(keys, values, jnp.asarray([N, N]))
    with pytest.raises(ContextLengthError, match="capacity"):
        cache.append(keys[:, :, 0], values[:, :, 0])


def test_missing_tier2_is_refused_not_degraded():
    cache = build(*kv(), jnp.asarray([N, N])).replace(host_values=None)
    with pytest.raises(MissingTier2Error, match="tier 2"):
        certified_attention(jnp.zeros((B, 2 * H, D)), cache, POLICY)


def test_tier2_on_the_device_is_refused():
    cache = build(*kv(), jnp.asarray([N, N]))
    moved = cache.replace(host_keys=jax.device_put(cache.host_keys, jax.memory.Space.Device))
    with pytest.raises(MissingTier2Error, match="host_keys"):
        certified_attention(jnp.zeros((B, 2 * H, D)), moved, POLICY)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda k, v: (k, v[:, :2]), "must both be"),
        (lambda k, v: (k[0], v[0]), "must both be"),
        (lambda k, v: (k.astype(jnp.int32), v.astype(jnp.int32)), "dtype"),
        (lambda k, v: (k, v.astype(jnp.float32)), "dtype"),
    ],
)
def test_bad_originals_are_refused(change, match):
    with pytest.raises(InvalidArgumentError, match=match):
        TieredKVCache.from_prefill(*change(*kv()), POLICY)


def test_capacity_below_the_prompt_is_refused():
    with pytest.raises(InvalidArgumentError, match="capacity"):
        TieredKVCache.from_prefill(*kv(), POLICY, capacity=N - 1)


@pytest.mark.parametrize("lengths", [[N + 1, N], [N, -1], [N], [[N, N]], [1.0, 2.0]], ids=str)
def test_lengths_that_are_none_of_the_originals_are_refused(lengths):
    with pytest.raises(InvalidArgumentError, match="lengths must be"):
        TieredKVCache.from_prefill(*kv(), POLICY, lengths=np.array(lengths))


def test_lengths_may_be_a_list_and_a_policy_may_not_be_missing():
    cache = TieredKVCache.from_prefill(*kv(), POLICY, lengths=[N, N - 5])
    assert cache.length.tolist() == [N, N - 5] and len(repr(cache)) < 400
    with pytest.raises(InvalidArgumentError, match="policy must be a certjax.Policy, got NoneType"):
        TieredKVCache.from_prefill(*kv(), None)


def test_token_of_the_wrong_shape_is_refused():
    cache = build(*kv(), jnp.asarray([5, 5]))
    with pytest.raises(InvalidArgumentError, match="k has shape"):
        cache.append(jnp.zeros((B, H, D + 1)), jnp.zeros((B, H, D)))


def test_growing_does_not_retrace():
    traces = 0

    @jax.jit
    def step(cache, k, v):
        nonlocal traces
        traces += 1
        return cache.append(k, v)

    keys, values = kv()
    cache = build(keys, values, jnp.asarray([3, 30]))
    for t in range(40):
        cache = step(cache, keys[:, :, t], values[:, :, t])
    assert traces == 1
