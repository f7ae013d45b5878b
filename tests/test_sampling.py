"""`sample`: against the definitions of greedy, temperature, top-k and nucleus sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from certjax import InvalidArgumentError
from certjax.sampling import Sampling, sample

V = 12
KEYS = jax.random.split(jax.random.key(3), 400)
STEP = jnp.int32(0)


def logits(rows: int = 1, seed: int = 0) -> jax.Array:
    """Distinct within a row, spread so that no probability is negligible."""
    rng = np.random.default_rng(seed)
    return jnp.asarray([rng.permutation(np.linspace(-1, 1, V)) for _ in range(rows)], jnp.float32)


def draws(scores, sampling):
    """400 draws of every row: [400, b]. Not jitted: each of the many parameters would compile a program of its own."""
    return jax.vmap(lambda key: sample(scores, sampling, key, STEP))(KEYS)


def drawn(scores, sampling) -> set[int]:
    return set(np.asarray(draws(scores, sampling))[:, 0].tolist())


@pytest.mark.smoke
@given(hnp.arrays(np.float32, (3, V), elements=st.floats(-50, 50, width=32)))
@settings(max_examples=30)
def test_greedy_takes_the_largest_logit_and_the_first_of_equals(scores):
    token = sample(jnp.asarray(scores), Sampling(), KEYS[0], STEP)
    assert token.dtype == jnp.int32
    np.testing.assert_array_equal(token, scores.argmax(-1))


def test_greedy_ignores_key_and_step_and_the_other_parameters():
    scores = logits(2)
    for key, step, sampling in [(0, 0, Sampling()), (1, 5, Sampling()), (0, 0, Sampling(top_k=3, top_p=0.2))]:
        token = sample(scores, sampling, jax.random.key(key), jnp.int32(step))
        np.testing.assert_array_equal(token, scores.argmax(-1))


def test_low_temperature_is_greedy_and_high_temperature_is_uniform():
    scores = logits()
    assert drawn(scores, Sampling(temperature=1e-4)) == {int(scores.argmax())}
    counts = np.bincount(np.asarray(draws(scores, Sampling(temperature=1e4)))[:, 0], minlength=V)
    # 400 draws of 12 equally likely tokens: five standard deviations are 28.
    assert np.abs(counts - 400 / V).max() < 28


def test_temperature_divides_the_logits():
    np.testing.assert_array_equal(
        draws(logits() * 3, Sampling(temperature=3.0)), draws(logits(), Sampling(temperature=1.0))
    )


def test_frequencies_are_the_softmax():
    scores = jnp.log(jnp.asarray([[0.5, 0.25, 0.125, 0.125]]))
    counts = np.bincount(np.asarray(draws(scores, Sampling(temperature=1.0)))[:, 0], minlength=4)
    np.testing.assert_allclose(counts / 400, [0.5, 0.25, 0.125, 0.125], atol=5 * 0.5 / 400**0.5)


@pytest.mark.smoke
@pytest.mark.parametrize("k", [1, 2, 5, V - 1])
def test_top_k_draws_the_k_likeliest_and_nothing_else(k):
    scores = logits()
    likeliest = set(np.asarray(scores)[0].argsort()[-k:].tolist())
    assert drawn(scores, Sampling(temperature=3.0, top_k=k)) == likeliest


@pytest.mark.parametrize("k", [0, V, V + 1, 10 * V])
def test_top_k_of_zero_or_the_whole_vocabulary_changes_nothing(k):
    np.testing.assert_array_equal(
        draws(logits(), Sampling(temperature=1.0, top_k=k)), draws(logits(), Sampling(temperature=1.0))
    )


def nucleus(scores: np.ndarray, top_p: float) -> tuple[set[int], float]:
    """The smallest set of likeliest tokens that holds `top_p`, and how close the choice of its size was."""
    p = np.exp(np.float64(scores) - scores.max())
    p /= p.sum()
    order = p.argsort()[::-1]
    mass = p[order].cumsum()
    size = int(np.searchsorted(mass, top_p)) + 1
    return set(order[:size].tolist()), np.abs(mass[:-1] - top_p).min()


@pytest.mark.smoke
@given(st.permutations(range(V)), st.floats(0.1, 3.0), st.floats(0.05, 0.99))
@example(list(range(V)), 0.5, 1e-6)
@settings(max_examples=25)
def test_nucleus_is_the_smallest_set_that_holds_top_p(order, spread, top_p):
    scores = np.asarray(order, np.float32) / V * np.float32(spread)
    expected, closeness = nucleus(scores, top_p)
    assume(closeness > 1e-5)
    found = drawn(jnp.asarray(scores)[None], Sampling(temperature=1.0, top_p=top_p))
    assert found <= expected
    p = np.exp(np.float64(scores))
    kept = p[list(expected)] / p[list(expected)].sum()
    # A token as likely as 6% is missed by 400 draws once in 10^10.
    assert {t for t, share in zip(expected, kept, strict=True) if share > 0.06} <= found


def test_top_p_of_one_keeps_every_token():
    np.testing.assert_array_equal(
        draws(logits(), Sampling(temperature=2.0, top_p=1.0)), draws(logits(), Sampling(temperature=2.0))
    )
    assert drawn(logits(), Sampling(temperature=2.0)) == set(range(V))


def test_nucleus_is_cut_from_what_top_k_left_and_at_the_temperature():
    scores = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1]]))
    # Of the first two, renormalized, the first holds 0.57.
    assert drawn(scores, Sampling(1.0, top_k=2, top_p=0.5)) == {0}
    assert drawn(scores, Sampling(1.0, top_k=2, top_p=0.6)) == {0, 1}
    # Without top_k the first holds 0.4, and at temperature 100 a little over a quarter.
    assert drawn(scores, Sampling(1.0, top_p=0.5)) == {0, 1}
    assert drawn(scores, Sampling(100.0, top_p=0.5)) == {0, 1}
    assert drawn(scores, Sampling(100.0, top_p=0.6)) == {0, 1, 2}


@pytest.mark.smoke
def test_row_draws_the_same_whatever_its_neighbours_are():
    sampling = Sampling(temperature=1.0, top_k=8, top_p=0.9)
    scores = logits(3)
    alone = draws(scores[:1], sampling)
    together = draws(scores, sampling)
    other_neighbours = draws(scores.at[1:].set(logits(2, seed=9)), sampling)
    np.testing.assert_array_equal(together[:, :1], alone)
    np.testing.assert_array_equal(other_neighbours[:, 0], together[:, 0])


def test_rows_steps_and_keys_draw_independently():
    scores = jnp.zeros((2, 1000))
    sampling = Sampling(temperature=1.0)

    def at(key, step):
        return sample(scores, sampling, jax.random.key(key), jnp.int32(step)).tolist()

    assert at(0, 0) == at(0, 0)
    every = [*at(0, 0), *at(0, 1), *at(1, 0), *at(1, 1)]
    assert len(set(every)) == len(every)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -0.1), ("top_k", -1), ("top_p", 0.0), ("top_p", -0.5), ("top_p", 1.01), ("top_p", float("nan"))],
)
def test_parameter_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(InvalidArgumentError, match=f"^{field} must be"):
        Sampling(**{field: value})


def test_temperature_that_is_no_number_is_refused():
    with pytest.raises(InvalidArgumentError, match="^temperature must be"):
        Sampling(temperature=float("nan"))
