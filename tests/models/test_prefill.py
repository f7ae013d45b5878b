"""Prefill against decode, and its attention against float64; padding, chunks, memory and retracing."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from certjax import Policy, TieredKVCache
from certjax import decode as programs
from certjax.errors import InvalidArgumentError
from certjax.models.llama.modeling import decode_step, init_params
from certjax.prefill import prefill, prefill_attention
from certjax.sampling import Sampling
from tests.models import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOLERANCE = 2e-4
jitted_prefill = jax.jit(prefill, static_argnames=("config", "chunk"))


@functools.partial(jax.jit, static_argnames="config")
def decode(config, params, cache, tokens):
    """Teacher-forced: `tokens` [b, m] -> (cache, logits [m, b, V])."""

    def step(cache, token):
        logits, cache, _ = decode_step(config, params, cache, token, cache.length, tiny.dense_attend)
        return cache.advance(1), logits

    return jax.lax.scan(step, cache, tokens.T)


@pytest.mark.parametrize("name", ["gqa", "mha", "mqa", "tied", "llama3_rope"])
def test_prefill_then_decode_equals_prefill_of_the_whole_for_a_ragged_batch(name):
    config = tiny.CONFIGS[name]
    params = init_params(config, jax.random.key(1))
    prompt, lengths, more = tiny.tokens(config, 3, 16), jnp.array([16, 5, 11]), 6
    extra = tiny.tokens(config, 3, more, seed=1)
    cache, _ = jitted_prefill(config, params, tiny.empty_cache(config, 3, 24), prompt, lengths, chunk=8)
    cache, logits = decode(config, params, cache, extra)
    assert cache.length.tolist() == [22, 11, 17]

    whole = np.zeros((3, 24), np.int32)
    for row, n in enumerate(lengths):
        whole[row, : n + more] = np.concatenate([prompt[row, :n], extra[row]])
    for m in range(more):
        _, expected = jitted_prefill(
            config, params, tiny.empty_cache(config, 3, 24), jnp.asarray(whole), lengths + m + 1, chunk=8
        )
        np.testing.assert_allclose(logits[m], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_model_runs_in_its_dtype_and_returns_float32_logits(dtype):
    config = dataclasses.replace(tiny.GQA, dtype=dtype, kv_dtype=None)
    params = init_params(config, jax.random.key(1))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    cache, logits = jitted_prefill(
        config, params, tiny.empty_cache(config, 1, 16), tiny.tokens(config, 1, 8), jnp.array([8]), chunk=8
    )
    assert cache.keys.dtype == config.kv_dtype and logits.dtype == jnp.float32
    assert jnp.isfinite(logits).all()


def test_chunk_size_changes_results_by_rounding_only():
    params = init_params(tiny.GQA, jax.random.key(1))
    prompt, lengths = tiny.tokens(tiny.GQA, 2, 32), jnp.array([32, 19])
    results = [
        jitted_prefill(tiny.GQA, params, tiny.empty_cache(tiny.GQA, 2, 32), prompt, lengths, chunk=chunk)
        for chunk in (4, 16, 32)
    ]
    for cache, logits in results[1:]:
        np.testing.assert_allclose(logits, results[0][1], atol=1e-5)
        for row, n in enumerate(lengths):
            np.testing.assert_allclose(
                cache.values[:, row, :, :n], results[0][0].values[:, row, :, :n], atol=1e-5
            )


def test_neither_padding_nor_what_the_cache_held_reaches_a_result():
    params = init_params(tiny.GQA, jax.random.key(1))
    prompt, lengths = tiny.tokens(tiny.GQA, 2, 16), jnp.array([16, 5])
    repadded = prompt.at[1, 5:].set(tiny.tokens(tiny.GQA, 11, seed=2))
    clean = jitted_prefill(tiny.GQA, params, tiny.empty_cache(tiny.GQA, 2, 32), prompt, lengths, chunk=8)
    dirty = jitted_prefill(
        tiny.GQA, params, tiny.empty_cache(tiny.GQA, 2, 32, fill=jnp.nan), repadded, lengths, chunk=8
    )
    np.testing.assert_array_equal(clean[1], dirty[1])
    np.testing.assert_array_equal(clean[0].keys[:, 1, :, :5], dirty[0].keys[:, 1, :, :5])


def oracle(q, keys, values, start, lengths):
    """Float64 attention, `[b, C, Hq, d]`; rows at or beyond their length are NaN."""
    q, keys, values = (np.asarray(x, np.float64) for x in (q, keys, values))
    out = np.full(q.shape, np.nan)
    group = q.shape[2] // keys.shape[1]
    for b, i, h in np.ndindex(q.shape[:3]):
        p = start + i
        if p < lengths[b]:
            s = keys[b, h // group, : p + 1] @ q[b, i, h] / np.sqrt(q.shape[-1])
            w = np.exp(s - s.max())
            out[b, i, h] = w @ values[b, h // group, : p + 1] / w.sum()
    return out


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_prefill_attention_equals_float64_softmax_with_nan_beyond_the_lengths(scale):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 8, 6, 16)).astype(np.float32) * scale
    keys, values = rng.normal(size=(2, 3, 2, 2, 40, 16)).astype(np.float16)
    start, lengths = 16, np.array([24, 19])
    for row, n in enumerate(lengths):
        keys[:, row, :, n:] = values[:, row, :, n:] = np.nan
    out = jax.jit(prefill_attention)(q, keys, values, jnp.int32(1), jnp.int32(start), jnp.asarray(lengths))
    expected = oracle(q, keys[1], values[1], start, lengths)
    valid = ~np.isnan(expected)
    np.testing.assert_allclose(np.asarray(out)[valid], expected[valid], atol=5e-6 * scale)
    assert np.isfinite(out).all()


def test_row_that_sees_nothing_gives_zeros():
    nan = jnp.full((1, 1, 1, 8, 4), jnp.nan)
    out = prefill_attention(jnp.ones((1, 4, 2, 4)), nan, nan, jnp.int32(0), jnp.int32(4), jnp.array([0]))
    np.testing.assert_array_equal(out, 0.0)


@pytest.mark.parametrize("codec", ["planes", "int8_int4"])
@pytest.mark.parametrize("tier2", ["host", "device"])
def test_layers_encoded_as_they_come_are_the_cache_that_the_originals_make(codec, tier2):
    """For rows that end in a block and between two; naive mode gets no originals."""
    config = dataclasses.replace(tiny.CONFIGS["wide_heads"], kv_dtype="bfloat16")
    params, policy = init_params(config, jax.random.key(1)), Policy.budget(codec=codec, block_size=16, tier2=tier2)
    prompts, lengths, capacity = tiny.tokens(config, 2, 256), jnp.array([250, 144]), 256
    prefilled, logits = programs.fill(config, capacity, params, prompts, lengths)
    build = jax.jit(TieredKVCache.from_prefill, static_argnames=("policy", "capacity"))
    want = build(prefilled.keys, prefilled.values, policy, lengths=lengths, capacity=capacity)
    got, same_logits = programs.fill_tiered(config, policy.form, capacity, params, prompts, lengths)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    np.testing.assert_array_equal(same_logits, logits)
    naive, _ = programs.fill_tiered(config, policy.form, capacity, params, prompts, lengths, originals=False)
    assert naive.host_keys is None and naive.host_values is None
    jax.tree.map(np.testing.assert_array_equal, naive, got.replace(host_keys=None, host_values=None))


@pytest.mark.parametrize("mode", ["dense", "naive", "certified"])
def test_what_prefill_made_is_what_decoding_begins_with(mode):
    """Not a copy: a second one would take as much memory again."""
    config, policy = tiny.CONFIGS["wide_heads"], Policy.budget(block_size=16)
    params, tokens = init_params(config, jax.random.key(1)), tiny.tokens(config, 1, 256)
    if mode == "dense":
        prefilled, logits = programs.fill(config, 256, params, tokens, jnp.array([200]))
    else:
        prefilled, logits = programs.fill_tiered(config, policy.form, 256, params, tokens, jnp.array([200]))
    state = programs.begin(config, mode, Sampling(), 4, programs.Telemetry, prefilled, logits, jax.random.key(0))
    assert state.cache is prefilled


def test_policies_that_store_alike_share_a_program():
    for policy in (Policy.budget(block_size=16), Policy.paper(), Policy.observe(codec="fp8_e4m3", centre="zero")):
        others = dict(tolerance=0.2, allotment="equal") if policy.kind == "budget" else dict(canary=False, scrub=3)
        assert dataclasses.replace(policy, **others).form == policy.form == policy.form.form
        blocks = dict(block_size=32, sink_tokens=32, recent_tokens=128)
        for stored in (blocks, dict(tier2="device"), dict(spectral=not policy.spectral)):
            assert dataclasses.replace(policy, **stored).form != policy.form
    assert Policy.budget().form == Policy.observe().form


def test_a_layers_room_is_one_layers():
    with pytest.raises(InvalidArgumentError, match="keep"):
        prefill(
            tiny.GQA, None, tiny.empty_cache(tiny.GQA, 1, 8), jnp.zeros((1, 8), jnp.int32), jnp.array([8]), chunk=8,
            keep=lambda k, v: None,
        )  # fmt: skip


def test_what_prefill_takes_meanwhile_does_not_grow_with_the_layers():
    """By less than one layer's originals for six layers more."""
    policy, n = Policy.budget(block_size=16), 4096

    def meanwhile(n_layers):
        config = dataclasses.replace(tiny.CONFIGS["wide_heads"], n_layers=n_layers, kv_dtype="bfloat16")
        arguments = init_params(config, jax.random.key(1)), tiny.tokens(config, 1, n), jnp.array([n])
        compiled = programs.fill_tiered.lower(config, policy.form, n, *arguments, originals=False).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    config = tiny.CONFIGS["wide_heads"]
    assert meanwhile(8) - meanwhile(2) < 2 * config.n_kv_heads * n * config.head_dim * 2


def test_memory_does_not_grow_with_the_square_of_the_context_nor_hold_a_second_cache():
    config = dataclasses.replace(tiny.GQA, n_layers=8)
    params = init_params(config, jax.random.key(1))
    n, chunk = 8192, 64
    cache = tiny.empty_cache(config, 1, n)
    compiled = (
        jax.jit(prefill, static_argnames=("config", "chunk"), donate_argnames="cache")
        .lower(config, params, cache, jnp.zeros((1, n), jnp.int32), jnp.array([n]), chunk=chunk)
        .compile()
    )
    hidden = n * config.d_model * 4
    assert compiled.memory_analysis().temp_size_in_bytes < hidden + cache.nbytes() / config.n_layers


def test_two_prompts_of_one_bucket_share_one_trace():
    traces = []

    @jax.jit
    def run(params, cache, prompt, lengths):
        traces.append(prompt.shape)
        return prefill(tiny.GQA, params, cache, prompt, lengths, chunk=8)

    params = init_params(tiny.GQA, jax.random.key(1))
    for n in (3, 15):
        run(params, tiny.empty_cache(tiny.GQA, 1, 16), tiny.tokens(tiny.GQA, 1, 16, seed=n), jnp.array([n]))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("padded", "max_length", "lengths", "message"),
    [
        (12, 16, [12], "not a positive multiple of chunk=8"),
        (0, 16, [0], "not a positive multiple of chunk=8"),
        (24, 16, [20], "holds 16"),
        (8, 16, [8, 8], "must be"),
    ],
)
def test_prompt_that_does_not_fit_is_refused(padded, max_length, lengths, message):
    params = init_params(tiny.GQA, jax.random.key(1))
    cache = tiny.empty_cache(tiny.GQA, 1, max_length)
    with pytest.raises(InvalidArgumentError, match=message):
        prefill(tiny.GQA, params, cache, jnp.zeros((1, padded), jnp.int32), jnp.array(lengths), chunk=8)
