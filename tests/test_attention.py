"""Certified attention: what is returned, and what the record says of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from certjax import InvalidArgumentError, Policy, attention, naive_attention, reading, select, terms
from certjax import attempt as att
from tests import problems
from tests.oracle import centred_terms, exact_attention, exact_error, f64
from tests.problems import B, D, G, H, N, certify, certify_at

pytestmark = pytest.mark.usefixtures("quick_compilation")

EQUAL = {relative: Policy.budget(0.1, relative, allotment="equal") for relative in ("layer", "head", "absolute")}
BUDGETS = [Policy.budget(0.1), *EQUAL.values()]
PAPERS = [Policy.paper(), Policy.paper(k_max=4, ranking_depth=2, sink_tokens=16, recent_tokens=64)]
every_policy = pytest.mark.parametrize(
    "policy",
    [pytest.param(p, marks=pytest.mark.smoke if p in (BUDGETS[0], PAPERS[0]) else ()) for p in BUDGETS + PAPERS],
    ids=lambda p: f"{p.kind}-{p.allotment}-{p.relative_to}",
)


@every_policy
def test_error_is_below_the_certificate_and_the_contract_holds(policy):
    q, keys, values, lengths = problems.originals()
    out, record = certify(q, problems.cache(policy), policy)
    assert (exact_error(out, q, keys, values, lengths) <= f64(record.e_total)).all()
    assert bool(((record.e_total <= record.tolerance) | (record.rung >= 3)).all())


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 3.0])
def test_tolerance_is_what_relative_to_says(scale):
    q, *_ = problems.originals(query_scale=scale)
    for relative, policy in EQUAL.items():
        out, record = certify(q, problems.cache(policy), policy)
        squared = (f64(out) ** 2).sum(-1)
        expected = {
            "layer": 0.1 * np.sqrt(squared.mean(-1, keepdims=True)) * np.ones_like(squared),
            "head": 0.1 * np.sqrt(squared),
            "absolute": np.full_like(squared, 0.1),
        }[relative]
        np.testing.assert_allclose(record.tolerance, expected, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0])
def test_pooled_tolerances_have_the_root_mean_square_that_was_asked_for(scale):
    q, keys, values, lengths = problems.originals(query_scale=scale)
    policy = Policy.budget(0.1)
    out, record = certify(q, problems.cache(policy), policy)
    norm, dense = np.linalg.norm(f64(out)), np.asarray(record.rung) >= 3

    def rms(x):
        return np.sqrt((f64(x) ** 2).mean(-1))

    asked = 0.1 * np.sqrt((f64(out) ** 2).sum(-1).mean(-1))
    np.testing.assert_allclose(rms(record.tolerance), asked, rtol=1e-5)
    assert (rms(record.e_total) <= asked * (1 + 1e-6)).all() or dense.all()
    # The layer's concatenated output is as close as the tolerance says.
    error = exact_error(out, q, keys, values, lengths)
    assert np.linalg.norm(error) <= 0.1 * norm


def test_one_group_that_cannot_fit_does_not_take_the_others_along():
    """Pooled: a group with an enormous bound goes dense, and the rest of the layer is judged without it."""
    policy = Policy.budget(0.5, scrub=0, canary=False, max_promoted=0.01)
    q, keys, values, lengths = problems.originals()
    cache = problems.cache(policy)
    huge = {
        "eta": cache.notes.eta.replace(peak=cache.notes.eta.peak.at[0, 0].set(jnp.inf)),
        "nu": cache.notes.nu.replace(peak=cache.notes.nu.peak.at[0, 0].multiply(1e6)),
        "sigma_v": cache.notes.sigma_v.at[0, 0].set(jnp.inf),
    }
    out, record = certify(q, cache.replace(notes=cache.notes.replace(**huge)), policy)
    rung = np.asarray(record.rung)
    assert (rung[0, :G] == 3).all() and (rung[0, G:] < 3).all() and (rung[1] < 3).all()
    assert (exact_error(out, q, keys, values, lengths) <= f64(record.e_total)).all()


def test_dense_head_steps_report_no_quantization_error():
    policy = EQUAL["absolute"]
    _, record = certify_at(1e-30, problems.originals()[0], problems.cache(policy), policy)
    for name in ("e_key", "e_val", "e_key_paper", "e_val_paper"):
        assert not np.asarray(getattr(record, name)).any()
        assert (np.asarray(getattr(record, f"{name}_candidate")) >= 0).all()
    np.testing.assert_array_equal(record.e_total, record.e_arith)
    assert (np.asarray(record.e_total_candidate) > 10 * np.asarray(record.e_total)).all()


@pytest.mark.parametrize("codec", problems.CODECS)
def test_observe_returns_the_naive_output_with_a_bound_on_its_error(codec):
    policy = Policy.observe(codec=codec)
    q, keys, values, lengths = problems.originals()
    cache = problems.cache(policy)
    out, record = certify(q, cache, policy)
    for name in ("rung", "k_star", "n_value_promoted", "n_value_skipped", "bytes_paged_in"):
        assert not np.asarray(getattr(record, name)).any()
    np.testing.assert_allclose(out, jax.jit(naive_attention)(q, cache), rtol=0, atol=1e-6)
    assert (exact_error(out, q, keys, values, lengths) <= f64(record.e_total)).all()


def test_loose_budget_reads_first_planes_and_no_values():
    policy = EQUAL["absolute"]
    q, keys, values, lengths = problems.originals()
    out, record = certify_at(1e9, q, problems.cache(policy), policy)
    for name in ("rung", "k_star", "n_value_promoted", "n_key_refined", "n_value_refined", "bytes_paged_in"):
        assert not np.asarray(getattr(record, name)).any()
    assert (np.asarray(record.n_value_skipped) > 0).all()
    assert (exact_error(out, q, keys, values, lengths) <= f64(record.e_total)).all()


def test_refinement_comes_before_promotion():
    """Tightening the tolerance first refines, then promotes, then goes dense; bytes read only grow."""
    q, *_ = problems.originals()
    policy = Policy.budget(host_price=1000.0, max_promoted=1.0)
    cache = problems.cache(policy)
    records = [certify_at(tolerance, q, cache, policy)[1] for tolerance in (3.0, 0.5, 0.3, 0.05, 1e-4)]

    def total(record, *names):
        return sum(int(getattr(record, name).sum()) for name in names)

    refined = [total(r, "n_key_refined", "n_value_refined") for r in records]
    paged = [total(r, "bytes_paged_in") for r in records]
    read = [total(r, "bytes_read", "bytes_paged_in") for r in records]
    assert refined[1] > refined[0] and paged[0] == paged[1] == 0 < paged[-1]
    assert read == sorted(read)


def test_mixture_of_levels_is_certified_for_any_choice():
    """Every block at a precision of its own, chosen at random, promoted or not: the bound holds all the same."""
    policy = Policy.observe(key_planes=(4, 4, 4), value_planes=(2, 2, 2), sink_tokens=0, recent_tokens=0)
    q, keys, values, lengths = problems.originals()
    cache = problems.cache(policy)

    @jax.jit
    def attempt(q, cache, k, v, promoted):
        problem = reading.build(q, cache)
        read = reading.read_keys(problem, cache, k), reading.read_values(problem, cache, v)
        plan = select.tier1_plan(read[0].delta_paper, 0, 0).replace(
            key_level=k, value_level=v, keys=promoted[0], values=promoted[1]
        )
        result, passed = attention._attend(policy, problem, cache, plan, *read)
        return result.out, result.e_total, passed.canary

    rng = np.random.default_rng(0)
    shape = (B, H, N // 16)
    active = np.arange(N // 16) < (np.asarray(lengths) - 1)[:, None] // 16
    for scale in (0.1, 1.0, 10.0):
        grouped = (q * scale).reshape(B, H, G, D)
        for share in (0.0, 0.3, 1.0):
            k, v = rng.integers(0, 3, shape), rng.integers(0, 4, shape)
            promoted = (rng.random((2, B, H, G, N // 16)) < share) & active[None, :, None, None]
            out, bound, canary = attempt(grouped, cache, jnp.asarray(k), jnp.asarray(v), jnp.asarray(promoted))
            error = exact_error(out.reshape(B, H * G, D), q * scale, keys, values, lengths)
            assert (error <= f64(bound).reshape(B, -1)).all() and canary.all()


def test_promoting_everything_leaves_the_error_of_float32():
    policy = Policy.paper(tau_cov=1.0, k_min=64, k_max=64, v_tol=0.0)
    q, keys, values, lengths = problems.originals()
    out, record = certify(q, problems.cache(policy), policy)
    assert (np.asarray(record.rung) == 2).all()
    assert not np.asarray(record.e_key).any() and not np.asarray(record.e_val).any()
    assert exact_error(out, q, keys, values, lengths).max() < 1e-5


def test_everything_in_the_windows_needs_no_tier1():
    policy = Policy.budget(0.001, recent_tokens=512)
    out, record = certify(problems.originals()[0], problems.cache(policy), policy)
    assert not np.asarray(record.rung).any() and not np.asarray(record.e_key).any()


def test_tightening_the_tolerance_never_loosens_the_bound():
    """Ladder monotonicity: a smaller tolerance gives smaller bounds, higher rungs, more page-ins per head."""
    q, *_ = problems.originals()
    policy = EQUAL["absolute"]
    cache = problems.cache(policy)
    records = [certify_at(tolerance, q, cache, policy)[1] for tolerance in (1e9, 0.4, 0.2, 0.1, 1e-9)]
    for loose, tight in zip(records, records[1:], strict=False):
        assert (np.asarray(tight.rung) >= np.asarray(loose.rung)).all()
        within = np.asarray(tight.e_total) <= np.asarray(loose.e_total) * (1 + 1e-5)
        assert (within | (np.asarray(tight.rung) >= 3)).all()
        assert int(tight.bytes_paged_in.sum()) >= int(loose.bytes_paged_in.sum())


def test_bytes_paged_in_count_each_block_once():
    policy = Policy.paper(k_min=64, k_max=64, tau_cov=1.0, v_tol=0.0)
    q, keys, *_ = problems.originals()
    _, record = certify(q, problems.cache(policy), policy)
    block = 16 * D * keys.dtype.itemsize
    # Blocks read from tier 1: all but the one in the ring; keys and values, once per KV head, charged to one head.
    expected = [2 * block * ((n - 1) // 16) * H for n in problems.LENGTHS]
    assert record.bytes_paged_in.sum(-1).tolist() == expected
    assert np.count_nonzero(np.asarray(record.bytes_paged_in)) == B * H


def test_sums_of_the_certificate_equal_the_formulas():
    """The twin against float64: every term of the centred bound by its definition, everything quantized."""
    policy = Policy.paper(centre="mean")
    q, keys, values, _ = problems.originals()
    n = 16 * 20 + 1  # twenty closed blocks; the single token in the ring is left out below
    cache = problems.build(keys, values, jnp.full(B, n), policy)

    @jax.jit
    def evaluate(cache):
        problem = reading.build(q.reshape(B, H, G, D), cache)
        problem = problem.replace(window_scores=jnp.full_like(problem.window_scores, -jnp.inf))
        read = reading.read_keys(problem, cache, 0), reading.read_values(problem, cache, 1)
        plan = select.tier1_plan(read[0].delta_paper, 0, 1)
        w = att.weights(problem, read[0].scores)
        return problem, read, att.evaluate(problem, cache, *read, w, plan, None)

    problem, read, attempt = evaluate(cache)
    k_hat = cache.codec.keys(cache.codes, 0).reshape(B, H, -1, D)
    live = slice(0, n - 1)
    delta = read[0].delta.reshape(B, H, G, -1)
    eta, nu = (x.reshape(B, H, -1) for x in (read[1].eta, problem.nu))
    for b in range(B):
        for h in range(H):
            want = centred_terms(
                q.reshape(B, H, G, D)[b, h], k_hat[b, h, live], read[1].y[b, h, live], delta[b, h, :, live],
                eta[b, h, live], nu[b, h, live], cache.stats.value_centre[b, h],
            )  # fmt: skip
            np.testing.assert_allclose(attempt.out[b, h], want["out"], atol=1e-5)
            np.testing.assert_allclose(attempt.e_val[b, h], want["e_val"], rtol=1e-5)
            np.testing.assert_allclose(attempt.e_key[b, h], want["e_key"], rtol=1e-3)


def test_estimated_terms_are_close_to_the_bound_they_stand_for():
    """Selection weighs estimates per block: added up they must be near what is then certified."""
    policy = Policy.observe(sink_tokens=0, recent_tokens=0)
    q, *_ = problems.originals()
    cache = problems.cache(policy)

    @jax.jit
    def both(cache):
        problem = reading.build(q.reshape(B, H, G, D), cache)
        coarse = reading.read_keys(problem, cache, 0)
        seen = terms.scan(problem, coarse, att.weights(problem, coarse.scores))
        certified = []
        for k, v in ((0, 0), (0, 1), (1, 2)):
            read = reading.read_keys(problem, cache, k), reading.read_values(problem, cache, v)
            plan = select.tier1_plan(coarse.delta_paper, k, v)
            certified.append(att.evaluate(problem, cache, *read, att.weights(problem, read[0].scores), plan, None))
        key = terms.key_terms(problem, cache, seen, certified[2].offset)
        value = terms.value_terms(problem, cache, seen, skip=True)
        return [t.sum(-1) for t in key], [t.sum(-1) for t in value], certified

    key, value, certified = both(cache)
    for i in range(3):
        ratio = np.asarray(value[i]) / np.asarray(certified[i].e_val)
        assert ratio.min() > 0.9 and ratio.max() < 1.6
    ratio = np.asarray(key[1]) / np.asarray(certified[2].e_key)
    assert ratio.min() > 0.7 and ratio.max() < 1.6
    assert not np.asarray(key[-1]).any() and not np.asarray(value[-1]).any()


def test_stacked_view_certifies_like_a_single_layer():
    policy = PAPERS[0]
    q, keys, values, lengths = problems.originals()
    stacked = problems.build(jnp.stack([values, keys]), jnp.stack([keys, values]), lengths, policy)
    view = jax.jit(lambda cache, layer: certify(q, cache.at(layer), policy))
    out, record = view(stacked, jnp.int32(1))
    single, single_record = certify(q, problems.cache(policy), policy)
    np.testing.assert_allclose(out, single, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(record.rung, single_record.rung)


def test_query_is_used_in_float32_whatever_its_dtype():
    policy = PAPERS[0]
    q = problems.originals()[0].astype(jnp.bfloat16)
    out, _ = certify(q, problems.cache(policy), policy)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, certify(q.astype(jnp.float32), problems.cache(policy), policy)[0])


@pytest.mark.parametrize("shape", [(B, H * G, D + 1), (B + 1, H * G, D), (B, H * G + 1, D), (H * G, D)])
def test_query_that_does_not_fit_the_cache_is_refused(shape):
    policy = BUDGETS[0]
    with pytest.raises(InvalidArgumentError, match="q must be"):
        certify(jnp.zeros(shape), problems.cache(policy), policy)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 15), (16, 17), (31, 33)])
def test_short_sequences_are_exact_because_they_are_in_the_ring(lengths):
    policy = Policy.paper()
    q, keys, values, _ = problems.originals()
    n = jnp.asarray(lengths)
    out, record = certify(q, problems.build(keys, values, n, policy), policy)
    error = exact_error(out, q, keys, values, lengths)
    assert (error <= f64(record.e_total)).all()
    assert error[0].max() < 1e-5 or lengths[0] > 16


def test_oracle_agrees_with_a_textbook_softmax():
    q, k, v = np.array([[[1.0, 0.0]]]), np.array([[[[1.0, 0.0], [0.0, 1.0]]]]), np.array([[[[1.0, 2.0], [3.0, 4.0]]]])
    w = np.exp([1 / np.sqrt(2), 0.0])
    np.testing.assert_allclose(exact_attention(q, k, v, [2])[0, 0], (w / w.sum()) @ v[0, 0], rtol=1e-12)


def test_no_retrace_while_a_cache_grows():
    policy = PAPERS[0]
    traces = 0

    @functools.partial(jax.jit, donate_argnums=0)
    def step(cache, q, k, v):
        nonlocal traces
        traces += 1
        cache = cache.append(k, v)
        return cache, certify(q, cache, policy)

    q, keys, values, _ = problems.originals()
    cache = problems.build(keys, values, jnp.full(B, 200), policy)
    for t in range(200, 240):
        cache, (out, record) = step(cache, q, keys[:, :, t], values[:, :, t])
        assert (exact_error(out, q, keys, values, [t + 1] * B) <= f64(record.e_total)).all()
    assert traces == 1


def test_queries_may_be_numpys_and_not_integers():
    q, *_ = problems.originals()
    policy = Policy.paper()
    cache = problems.cache(policy)
    out, _ = attention.certified_attention(np.asarray(q), cache, policy)
    want, _ = attention.certified_attention(q, cache, policy)
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(attention.dense_attention(np.asarray(q), cache), attention.dense_attention(q, cache))
    with pytest.raises(InvalidArgumentError, match="q must be floating point.*int32"):
        attention.certified_attention(np.zeros(q.shape, np.int32), cache, policy)
    with pytest.raises(InvalidArgumentError, match="policy must be a certjax.Policy, got str"):
        attention.certified_attention(q, cache, "paper")
