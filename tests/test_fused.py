"""The fused path as a whole, on the kernels' twins: what it returns, refuses and falls back to."""

import dataclasses
import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from certjax import (
    InvalidArgumentError,
    LlamaConfig,
    Model,
    Policy,
    TieredKVCache,
    decode,
    generate,
    pick_backend,
)
from certjax.attention import certified_layer, naive_layer
from certjax.bench import step
from certjax.checks import scrubbed
from certjax.cli import main
from certjax.fused import operands as ops
from certjax.fused import project
from certjax.fused.ladder import allotted, heads_to_give_up
from certjax.fused.plan import REFRESH, due
from certjax.models.llama.modeling import init_params
from certjax.sampling import Sampling
from pallas_kernels import levels as lv
from pallas_kernels.levels import COARSE, PROMOTED
from tests.oracle import exact_error
from tests.problems import certify, certify_at

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, H, G, N, D = 2, 2, 4, 1024, 64
LENGTHS = jnp.array([1000, 640])
POLICY = Policy.budget(0.05, block_size=128, backend="reference", scrub=1)


@functools.cache
def originals():
    """`q` [B, H G, D], keys and values [B, H, N, D]: values share a mean, one key is what a head looks for."""
    a, b, c, d = jax.random.split(jax.random.key(3), 4)
    q = jax.random.normal(a, (B, H, G, D))
    keys = jax.random.normal(b, (B, H, N, D)).at[:, :, 300].set(2 * q.mean(2))
    values = 0.3 * jax.random.normal(c, (B, H, N, D)) + jax.random.normal(d, (1, H, 1, D))
    return q.reshape(B, -1, D), keys.astype(jnp.bfloat16), values.astype(jnp.bfloat16)


@functools.partial(jax.jit, static_argnames="policy")
def build(keys, values, policy):
    return TieredKVCache.from_prefill(keys, values, policy, lengths=LENGTHS, capacity=N)


def cache_of(policy=POLICY):
    return build(*originals()[1:], policy)


def test_choice_of_back_end_is_explained_and_can_be_overridden():
    cache = cache_of()
    name, reason = pick_backend(dataclasses.replace(POLICY, backend="auto"), cache, H * G, explain=True)
    assert (name == "xla") == (jax.devices()[0].platform != "gpu") and reason
    assert pick_backend(POLICY, cache, H * G) == "reference"
    assert pick_backend(dataclasses.replace(POLICY, backend="xla"), cache, H * G) == "xla"


@pytest.mark.parametrize(
    "policy, words",
    [
        (Policy.paper(backend="reference"), "paper policy"),
        (Policy.budget(backend="reference"), "block_size is 16"),
        (Policy.budget(backend="reference", block_size=128, key_planes=(8, 2)), "codec"),
        (Policy.budget(backend="reference", block_size=128, annotations="bfloat16"), "annotations"),
    ],
)
def test_back_end_that_does_not_cover_the_policy_is_refused(policy, words):
    cache = jax.eval_shape(functools.partial(build, policy=policy), *originals()[1:])
    with pytest.raises(InvalidArgumentError, match=words):
        pick_backend(policy, cache, H * G)


@pytest.mark.parametrize("device, kernels, words", [
    (("cpu", ""), "mosaic_gpu", "the device is a cpu"),
    (("cpu", ""), "triton", "the device is a cpu"),
    (("gpu", "8.0"), "mosaic_gpu", r"capability '8.0', the kernels on Mosaic need 9.0"),
    (("gpu", "12.0"), "mosaic_gpu", r"capability '12.0', the kernels on Mosaic need 9.0"),
    (("gpu", "7.5"), "triton", r"capability '7.5', the kernels need NVIDIA's 8.0"),
    (("gpu", "gfx942"), "triton", r"capability 'gfx942', the kernels need NVIDIA's 8.0"),
])  # fmt: skip
def test_kernels_are_refused_without_their_device(monkeypatch, device, kernels, words):
    monkeypatch.setattr("certjax.fused.dispatch._device", lambda: device)
    with pytest.raises(InvalidArgumentError, match=words):
        pick_backend(dataclasses.replace(POLICY, backend=kernels), cache_of(), H * G)


@pytest.mark.parametrize("device, kernels, words", [
    (("cpu", ""), "xla", "the device is a cpu"),
    (("gpu", "7.5"), "xla", "capability '7.5'"),
    (("gpu", "gfx942"), "xla", "capability 'gfx942'"),
    (("gpu", ""), "xla", "capability ''"),
    (("gpu", "8.0"), "triton", "capability 8.0"),
    (("gpu", "8.9"), "triton", "capability 8.9"),
    (("gpu", "9.0"), "mosaic_gpu", "capability 9.0"),
    (("gpu", "10.3"), "triton", "capability 10.3"),
    (("gpu", "12.1"), "triton", "capability 12.1"),
])  # fmt: skip
def test_the_device_decides_on_the_kernels(monkeypatch, device, kernels, words):
    pytest.importorskip("triton")
    monkeypatch.setattr("certjax.fused.dispatch._device", lambda: device)
    choice, reason = pick_backend(dataclasses.replace(POLICY, backend="auto"), cache_of(), H * G, explain=True)
    assert choice == kernels and words in reason


@pytest.mark.parametrize("capability", ["8.0", "9.0"])
def test_without_triton_there_are_no_kernels(monkeypatch, capability):
    monkeypatch.setattr("certjax.fused.dispatch._device", lambda: ("gpu", capability))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    choice, reason = pick_backend(dataclasses.replace(POLICY, backend="auto"), cache_of(), H * G, explain=True)
    assert choice == "xla" and "pip install certjax[gpu]" in reason


def test_unknown_back_end_is_refused():
    with pytest.raises(InvalidArgumentError, match="backend"):
        Policy.budget(backend="cuda")


@pytest.mark.parametrize("tolerance", [0.002, 0.05, 0.5])
def test_bounds_hold_and_reading_falls_with_the_tolerance(tolerance):
    q, k, v = originals()
    out, record = jax.device_get(certify_at(tolerance, q, cache_of(), POLICY))
    assert (exact_error(out, q, k, v, LENGTHS) <= record.e_total).all()
    assert ((record.e_total <= record.tolerance) | (record.rung >= 3)).all()
    assert record.canary_ok.all() and record.precondition_ok.all()
    tight = jax.device_get(certify_at(tolerance / 4, q, cache_of(), POLICY)[1])
    used, more = (r.bytes_read.sum() + 8 * r.bytes_paged_in.sum() for r in (record, tight))
    assert used <= more
    assert record.rung.max() >= 2 if tolerance == 0.002 else record.rung.max() < 3


def test_observe_returns_naive_attention_with_a_bound():
    q, k, v = originals()
    policy = Policy.observe(block_size=128, backend="reference")
    cache = cache_of(policy)
    out, record = certify(q, cache, policy)
    naive = jax.jit(lambda q, c: naive_layer(q, c.stacked(), jnp.int32(0), policy))(q, cache)
    np.testing.assert_array_equal(out, naive)
    assert (exact_error(out, q, k, v, LENGTHS) <= np.asarray(record.e_total)).all()
    assert (np.asarray(record.rung) == 0).all() and np.isinf(record.tolerance).all()


def test_naive_reads_all_of_tier_1_whatever_the_policy():
    q, *_ = originals()
    run = jax.jit(lambda q, c, policy: naive_layer(q, c.stacked(), jnp.int32(0), policy), static_argnums=2)
    by_plan = run(q, cache_of().replace(plan=0 * cache_of().plan), POLICY)
    np.testing.assert_array_equal(by_plan, run(q, cache_of(), Policy.observe(block_size=128, backend="reference")))


def test_same_cache_on_xla_agrees_within_both_bounds():
    q, *_ = originals()
    out, record = certify(q, cache_of(), POLICY)
    other, record_xla = certify(q, cache_of(), dataclasses.replace(POLICY, backend="xla"))
    gap = np.linalg.norm(np.asarray(out - other, np.float64), axis=-1)
    assert (gap <= np.asarray(record.e_total + record_xla.e_total)).all()


def test_layer_of_a_stack_is_that_layer():
    q, k, v = originals()
    pair = TieredKVCache.from_prefill(
        jnp.stack([v, k]), jnp.stack([k, v]), POLICY, lengths=LENGTHS, capacity=N
    )
    alone, _ = certify(q, cache_of(), POLICY)
    stacked, *_ = jax.jit(lambda q, c: certified_layer(q, c, jnp.int32(1), POLICY))(q, pair)
    np.testing.assert_array_equal(alone, stacked)


def test_damaged_codes_take_the_layer_to_dense():
    q, k, v = originals()
    cache = cache_of()
    planes = list(cache.codes.k_planes)
    planes[0] = planes[0].at[1, 0, 2, 5, 7].add(1)  # row 1, a block of tier 1
    damaged = cache.replace(codes=cache.codes.replace(k_planes=tuple(planes)))
    out, record = jax.device_get(certify(q, damaged, POLICY))
    assert (record.rung[1] == 4).all() and not record.precondition_ok[1].any()
    assert (record.rung[0] < 3).all() and record.precondition_ok[0].all()
    assert (exact_error(out, q, k, v, LENGTHS) <= record.e_total).all()


@pytest.mark.parametrize("norm", [np.inf, np.nan, 1e10])
def test_dense_rung_rests_on_originals_alone(norm):
    """A damaged annotation of the keys, which every score of tier 1 is measured by, and a damaged centre."""
    q, k, v = originals()
    cache = cache_of()
    centre = cache.stats.key_centre
    damaged = cache.replace(
        notes=cache.notes.replace(k_norm=cache.notes.k_norm.at[1, 0, 2].set(norm)),
        stats=cache.stats.replace(key_centre=centre.at[1].multiply(1e6)),
    )
    out, record = jax.device_get(certify(q, damaged, POLICY))
    assert (record.rung[1] == 4).all()
    error = exact_error(out, q, k, v, LENGTHS)[1]
    assert (error <= record.e_total[1]).all() and (record.e_total[1] < 1e-2 * record.out_norm[1]).all()


def test_scrubbing_of_a_stack_visits_every_layer_and_block():
    q, k, v = originals()
    cache = TieredKVCache.from_prefill(jnp.stack([k, k]), jnp.stack([v, v]), POLICY, lengths=LENGTHS, capacity=N)
    scale = cache.codes.v_scale
    damaged = cache.replace(codes=cache.codes.replace(v_scale=scale.at[1, 0, 1, 3, 9].multiply(2)))
    scrub = jax.jit(lambda c: scrubbed(c, 4).counting())
    for _ in range(8):  # two layers, four stripes
        cache, damaged = scrub(cache), scrub(damaged)
    assert cache.sound.all()
    assert damaged.sound.tolist() == [False, True]


def test_scores_beyond_every_range_go_dense_and_stay_certified():
    q, k, v = originals()
    out, record = jax.device_get(certify(q * 300, cache_of(), POLICY))
    assert np.isfinite(out).all() and (record.rung >= 3).any()
    assert (exact_error(out, q * 300, k, v, LENGTHS) <= record.e_total).all()


def test_weights_of_the_block_being_filled_are_right_or_dense():
    """No annotation says how large its keys are: sums up to 2^128 and beyond, whose reciprocals vanish."""
    q, k, v = originals()
    stack = cache_of().stacked()
    queries = ops.prepare(q.reshape(B * H, G, D), ops.layer_of(stack, jnp.int32(0), ops.shared(stack)))
    rungs = []
    for above in (0, 60, 90, *np.arange(125.2, 128.2, 0.2), 150, 300):  # the reference, in units of log 2
        score = queries.reference[0, 0] + above * np.log(2)
        towards = q[0, 0] / jnp.square(q[0, 0]).sum() * D**0.5 * score
        keys = k.at[0, 0, 990].set(towards.astype(jnp.bfloat16))
        out, record = jax.device_get(certify(q, build(keys, v, POLICY), POLICY))
        assert (exact_error(out, q, keys, v, LENGTHS) <= record.e_total).all()
        assert ((record.e_total <= record.tolerance) | (record.rung >= 3)).all()
        rungs.append(int(record.rung[0, 0]))
    assert min(rungs) < 3 <= max(rungs) and rungs == sorted(rungs)


@settings(max_examples=200)
@given(
    seed=st.integers(0, 2**32 - 1),
    relative_to=st.sampled_from(["layer", "head", "absolute"]),
    allotment=st.sampled_from(["pooled", "equal"]),
)
def test_contract_holds_whatever_dense_attention_returns(seed, relative_to, allotment):
    rng = np.random.default_rng(seed)
    policy = Policy.budget(0.1, relative_to, allotment=allotment)
    shape = (3, 4, 2)
    norm = jnp.asarray(np.exp(rng.normal(0, 2, shape)), jnp.float32)
    bound = jnp.asarray(np.exp(rng.normal(-3, 2, shape)), jnp.float32)
    bound = jnp.where(jnp.asarray(rng.random(shape) < 0.05), jnp.asarray(rng.choice([np.inf, np.nan])), bound)
    gone = jnp.asarray(rng.random(shape[:2]) < 0.1)
    dense = heads_to_give_up(policy, norm, bound, gone)[..., None]
    assert bool((dense[..., 0] | ~gone).all())
    norm = jnp.where(dense, jnp.asarray(rng.choice([0.0, 1.0, 1e6]), jnp.float32), norm)
    tolerance = allotted(policy, norm, jnp.where(dense, 0.0, bound))
    assert bool((dense | (bound <= tolerance)).all())


def test_fewest_heads_go_dense():
    norm = jnp.ones((1, 4, 1))
    bound = jnp.array([0.01, 0.9, 0.02, 0.01])[None, :, None]
    dense = heads_to_give_up(Policy.budget(0.05), norm, bound, jnp.zeros((1, 4), bool))
    assert dense.tolist() == [[False, True, False, False]]


@functools.cache
def small_model():
    config = LlamaConfig(
        vocab_size=97, d_model=128, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=64, d_ff=96, rms_eps=1e-5,
        context_length=2048, kv_dtype="bfloat16",
    )  # fmt: skip
    return Model(config=config, params=init_params(config, jax.random.key(0)), tokenizer=None)


def test_generation_closes_blocks_and_keeps_the_contract():
    prompt = np.random.default_rng(0).integers(0, 97, 635).tolist()
    runs = {mode: generate(small_model(), prompt, max_new_tokens=20, mode=mode, policy=POLICY) for mode in
            ("dense", "naive", "certified")}  # fmt: skip
    record, valid = runs["certified"].telemetry.certificate, runs["certified"].telemetry.valid
    assert valid.all() and (record.precondition_ok & record.canary_ok).all()
    assert ((record.e_total <= record.tolerance) | (record.rung >= 3)).all()
    # Block 4 closed after five tokens, and the scrubbing found nothing wrong with it.
    assert len(runs["certified"].tokens[0]) == 20
    agree = [(runs["dense"].tokens[0] == runs[mode].tokens[0]).mean() for mode in ("naive", "certified")]
    assert agree[1] == 1.0, agree


at_layer_0 = jax.jit(
    lambda q, c, policy: certified_layer(q, c.stacked(), jnp.int32(0), policy)[:3], static_argnames="policy"
)


def test_a_plan_serves_the_steps_after_it():
    q, k, v = originals()
    cache, policy = cache_of(), dataclasses.replace(POLICY, tolerance=0.01)
    _, first, plan = at_layer_0(q, cache, policy)
    assert (cache.plan == COARSE).all() and (plan != cache.plan).any(), "its bound held with coarse values alone"
    out, second, same = at_layer_0(q, cache.replace(plan=plan), policy)
    np.testing.assert_array_equal(plan, same)
    assert (exact_error(out, q, k, v, LENGTHS) <= np.asarray(second.e_total)).all()
    assert (second.e_total <= second.tolerance).all() and (np.asarray(second.rung) < 3).all()
    # Nothing is read twice: the first step read its values at their coarsest, and then by the plan.
    assert second.bytes_read.sum() < first.bytes_read.sum()
    np.testing.assert_array_equal(second.n_key_refined, first.n_key_refined)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1), tolerance=st.sampled_from([0.01, 0.05]),
    kind=st.sampled_from(["own", "stray", "any"]),
)
def test_any_plan_ends_in_the_contract(seed, tolerance, kind):
    """A plan is a guess: whatever it says, of tiles that are not there too, bounds hold, and so does the contract."""
    q, k, v = originals()
    rng, cache = np.random.default_rng(seed), cache_of()
    level = rng.integers(0, PROMOTED + 1, cache.plan.shape)
    plan = np.where(level == PROMOTED, lv.word(PROMOTED, rng.integers(1, 1 + lv.every_piece(D), level.shape)), level)
    if kind == "own":
        plan = np.where(np.arange(plan.shape[-1]) < 4, plan, COARSE)
    elif kind == "any":
        plan = rng.integers(0, 2**16, level.shape)
    policy = dataclasses.replace(POLICY, tolerance=tolerance)
    guess = cache.replace(plan=jnp.asarray(plan, jnp.uint16))
    out, record, after = jax.device_get(at_layer_0(q, guess, policy))
    assert (exact_error(out, q, k, v, LENGTHS) <= record.e_total).all()
    assert ((record.e_total <= record.tolerance) | (record.rung >= 3)).all()
    assert record.canary_ok.all() and record.precondition_ok.all()
    stack = cache.stacked()
    active = np.asarray(ops.shared(stack).active).reshape(plan.shape)
    assert (after[~active] == COARSE).all()


def test_plans_are_made_anew_now_and_then():
    """What is read in vain is dropped after REFRESH steps at most, each layer at a step of its own."""
    steps = np.array([due(jnp.arange(2 * REFRESH), jnp.int32(layer)) for layer in range(2)])
    assert (steps.sum(1) == 2).all() and not (steps[0] & steps[1]).any()
    q, *_ = originals()
    everything, held_on = jnp.full_like(cache_of().plan, lv.FINEST), []
    for n in LENGTHS[0] - jnp.arange(REFRESH):
        cache = cache_of().replace(plan=everything, length=LENGTHS.at[0].set(n))
        plan = at_layer_0(q, cache, POLICY)[2]
        held_on.append(bool((plan[0] == lv.FINEST).any()))
    assert sum(held_on) == REFRESH - 1 and not held_on[int(LENGTHS[0] % REFRESH)]


def test_decoding_carries_its_plans():
    model = small_model()
    prompt = jnp.asarray(np.random.default_rng(0).integers(0, 97, (1, 768)), jnp.int32)
    fixed = model.config, "certified", POLICY, Sampling()
    state = decode.start(*fixed, 768, 8, model.params, prompt, jnp.array([640]), jax.random.key(0))
    assert state.cache.plan.shape == (2, 1, 2, 6) and (state.cache.plan == COARSE).all()
    after = decode.run(*fixed, model.params, state, jnp.int32(4))
    assert (after.cache.plan != COARSE).any()


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("dtype, param_dtype", [("bfloat16", "bfloat16"), ("float32", "bfloat16")])
@pytest.mark.parametrize("kind", ["budget", "observe"])
def test_a_step_traces_as_on_a_hopper_gpu(monkeypatch, batch, dtype, param_dtype, kind):
    """Whatever projects the output, in kernels or not, hands the model what it goes on with."""
    pytest.importorskip("triton")
    monkeypatch.setattr("certjax.fused.dispatch._device", lambda: ("gpu", "9.0"))
    policy = Policy.budget(0.05, block_size=128) if kind == "budget" else Policy.observe(block_size=128)
    config = dataclasses.replace(small_model().config, dtype=dtype)
    keys = jnp.zeros((2, batch, 2, 512, 64), jnp.bfloat16)
    cache = TieredKVCache.from_prefill(keys, keys, policy, lengths=jnp.full(batch, 300))
    assert pick_backend(policy, cache, 4) == "mosaic_gpu"
    params = jax.tree.map(lambda x: x.astype(param_dtype), init_params(config, jax.random.key(0)))
    used = []
    monkeypatch.setattr(project, "in_kernels", lambda *x, f=project.in_kernels: used.append(x) or f(*x))
    logits, *_ = jax.eval_shape(
        functools.partial(decode.step, config, "certified", policy), params, cache, jnp.zeros(batch, jnp.int32)
    )
    assert logits.shape == (batch, 97)
    assert bool(used) == (kind == "budget" and dtype == "bfloat16")


def test_bench_reports_ratios_in_a_table(tmp_path):
    out = tmp_path / "bench.json"
    arguments = ["bench", "attention", "--contexts", "512", "--workloads", "concentrated", "--out", str(out)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "certified / dense" in out.with_suffix(".md").read_text()
    assert '"certified_over_dense"' in out.read_text()


@pytest.mark.parametrize("quick", [True, False])
def test_bench_times_whole_steps_on_caches_that_the_model_looks_into(monkeypatch, tmp_path, quick):
    small = dataclasses.replace(
        step.LLAMA_3_1_8B, vocab_size=64, d_model=128, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=64, d_ff=64
    )
    monkeypatch.setattr(step, "LLAMA_3_1_8B", small)
    monkeypatch.setattr(step, "LOOPS", 3)
    out = tmp_path / "step.json"
    options = ["--contexts", "1024", "--batches", "2", "--out", str(out), *["--quick"] * quick]
    result = CliRunner().invoke(main, ["bench", "step", *options])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(out.read_text())["rows"]
    assert row["batch"] == 2 and row["certified"]["p50"] > row["without attention"]["p50"] > 0
    # Queries that a cache was not made for see a flat one, which nothing certifies at 5%.
    for mode in ("certified",) if quick else ("certified", step.ANEW):
        rungs = row[f"rungs, {mode}"]
        assert sum(rungs) == 8 * 1 * 2 * 4 and sum(rungs[:3]) > 0.9 * sum(rungs)
    assert ("naive" in row) == (not quick)
    assert "certified / dense" in out.with_suffix(".md").read_text()


def test_bench_names_a_bad_argument():
    result = CliRunner().invoke(main, ["bench", "attention", "--contexts", "8k"])
    assert result.exit_code == 2 and "--contexts" in result.output
    result = CliRunner().invoke(main, ["bench", "attention", "--workloads", "spiky"])
    assert result.exit_code == 2 and "concentrated" in result.output
