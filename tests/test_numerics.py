import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import numerics as num

positive = st.floats(0, float(np.float32(3e38)), width=32)


@given(st.lists(positive, min_size=1, max_size=8))
def test_round_up_is_never_below_and_at_most_one_step_above(values):
    x = jnp.asarray(values, jnp.float32)
    up = num.round_up_bf16(x).astype(jnp.float32)
    # Subnormals may be flushed by the device before they are rounded: they then count as zero.
    normal = np.asarray(x) >= np.finfo(np.float32).tiny
    assert (np.asarray(up) >= np.asarray(x))[normal].all()
    assert (np.asarray(up, np.float64) <= np.asarray(x, np.float64) * (1 + 2.0**-7) + 1e-37)[normal].all()


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_round_up_passes_non_finite_values_through(value):
    out = np.asarray(num.round_up_bf16(jnp.float32(value)), np.float32)
    assert np.isnan(out) if np.isnan(value) else out == np.inf


@given(
    st.sampled_from([1, 2, 3, 17, 64, 80, 128, 299]),  # each is compiled
    st.integers(0, 2**31),
    st.sampled_from([1e-30, 1e-12, 1.0, 1e10, 1e30, 1e37]),
)
def test_norm_is_never_below_the_true_norm(d, seed, scale):
    x = (np.random.default_rng(seed).standard_normal(d) * scale).astype(np.float32)
    true = np.linalg.norm(x.astype(np.float64))
    got = float(num.norm_up(jnp.asarray(x)))
    assert true <= got <= true * (1 + 2.0**-13) + 1e-28


def test_norm_of_elements_near_the_largest_float32_is_not_zero():
    for x in ([3e38, 0.0], [1.7e38, 1e38]):
        assert float(jax.jit(num.norm_up)(jnp.asarray(x))) >= np.linalg.norm(np.asarray(x))


@given(st.integers(0, 2**31), st.floats(-9, 5), st.sampled_from(["float16", "bfloat16", "float32"]))
def test_representable_rounds_as_a_cast_does(seed, exponent, dtype):
    x = (np.random.default_rng(seed).standard_normal(64) * 10**exponent).astype(np.float32)
    want = jnp.asarray(x).astype(dtype)
    got = num.representable(jnp.asarray(x), dtype)
    np.testing.assert_array_equal(got, want.astype(jnp.float32))
    np.testing.assert_array_equal(num.cast(jnp.asarray(x), dtype), want)


def test_representable_keeps_infinities_and_nan():
    x = jnp.asarray([np.inf, -np.inf, np.nan, 1e6])
    np.testing.assert_array_equal(num.representable(x, "float16"), [np.inf, -np.inf, np.nan, np.inf])


def test_norm_of_zero_is_zero():
    assert float(num.norm_up(jnp.zeros(7))) == 0.0


@pytest.mark.parametrize("n", [1, 16, 131, 256, 1000, 4096, 8192])
def test_two_level_sum_error_is_within_gamma_of_its_depth(n):
    x = np.random.default_rng(n).lognormal(0, 3, (4, n)).astype(np.float32)
    true = x.astype(np.float64).sum(-1)
    got = np.asarray(jax.jit(num.sum_tokens)(x), np.float64)
    assert (np.abs(got - true) <= num.gamma(num.sum_depth(n)) * true).all()


def test_weighted_sum_agrees_with_float64_within_its_depth():
    rng = np.random.default_rng(0)
    w, v = rng.random((2, 3, 512)).astype(np.float32), rng.standard_normal((2, 512, 8)).astype(np.float32)
    true = np.einsum("bgn,bnd->bgd", w.astype(np.float64), v.astype(np.float64))
    bound = num.gamma(num.sum_depth(512)) * np.einsum("bgn,bnd->bgd", w, np.abs(v))
    assert (np.abs(np.asarray(num.weighted_sum(w, v)) - true) <= bound).all()


def test_sum_depth_is_far_below_the_number_of_terms():
    assert num.sum_depth(131072) == 256 + 512
    assert num.sum_depth(0) == 0


def test_gamma_refuses_too_many_terms():
    with pytest.raises(ValueError, match="too many"):
        num.gamma(2**24)


def test_exponential_is_as_accurate_as_the_certificate_assumes():
    """`exp(s - m)` of this device against float64, over the range where it is not flushed."""
    s = np.linspace(-87, 0, 200_001).astype(np.float32)
    peak = np.float32(3.14159)
    got = np.asarray(jax.jit(lambda s: jnp.exp(s - peak))(s + peak), np.float64)
    true = np.exp((s + peak).astype(np.float64) - np.float64(peak))
    assert (np.abs(got / true - 1)).max() < num.EXP_RELATIVE_ERROR / 2


def test_expm1_is_accurate_near_zero():
    x = np.logspace(-12, 1.3, 20_001).astype(np.float32)
    got = np.asarray(jax.jit(jnp.expm1)(x), np.float64)
    assert np.abs(got / np.expm1(x.astype(np.float64)) - 1).max() < 2.0**-18


@given(st.integers(0, 2**31), st.sampled_from([16, 64, 80, 128, 256]), st.floats(-3, 3))
def test_scores_are_within_the_dot_product_bound(seed, d, exponent):
    rng = np.random.default_rng(seed)
    q = (rng.standard_normal((3, d)) * 10.0**exponent).astype(np.float32)
    k = (rng.standard_normal((16, d)) + 5).astype(np.float32)
    true = q.astype(np.float64) @ k.astype(np.float64).T / np.sqrt(d)
    bound = num.gamma(d + 4) * np.linalg.norm(q, axis=-1)[:, None] * np.linalg.norm(k, axis=-1) / np.sqrt(d)
    assert (np.abs(np.asarray(num.dot_scores(q, k)) - true) <= bound).all()
