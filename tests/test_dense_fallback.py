"""Dense fallback and the dense mode are one function: equal to the bit on a CPU, under XLA's full optimization."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from certjax import Policy, dense_attention
from pallas_kernels.dense.reference import dense_reference
from tests import problems
from tests.problems import certify


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 304, 16),
        pytest.param((1, 3, 3, 2304, 64), marks=pytest.mark.smoke),
        (3, 4, 2, 1040, 80),
        pytest.param((2, 2, 4, 512, 128), marks=pytest.mark.long),
    ],
)
def test_dense_fallback_equals_the_dense_mode_to_the_bit(shape):
    out, _, mode, alone = fallen_back(shape)
    np.testing.assert_array_equal(out, mode)
    np.testing.assert_array_equal(out, alone)


def test_one_query_over_a_few_blocks_agrees_within_its_arithmetic():
    """XLA simplifies axes of length 1 away, and adds up in another order in one of the programs, on some processors."""
    out, record, mode, alone = fallen_back((1, 1, 1, 48, 16))
    for other in (mode, alone):  # either is within its own bound of the exact output
        assert (np.linalg.norm(np.float64(out) - np.float64(other), axis=-1) <= 2 * record.e_total).all()
    assert (record.e_total < 1e-3 * record.out_norm).all()


def fallen_back(shape):
    """Output and record of heads that all fell back; the dense mode's output, and `dense_attention`'s."""
    b, h, g, n, d = shape
    a, c, e = jax.random.split(jax.random.key(1), 3)
    keys, values = (jax.random.normal(x, (b, h, n, d), jnp.float16) for x in (a, c))
    q = jax.random.normal(e, (b, h * g, d)) * 2
    lengths = jnp.asarray([n - 3 - 7 * r for r in range(b)])
    impossible = Policy.budget(1e-30, "absolute", group_size=16)
    cache = problems.build(keys, values, lengths, impossible)
    out, record = certify(q, cache, impossible)
    assert bool((record.rung == 3).all())
    mode = jax.jit(dense_reference)(q.reshape(b, h, g, d), keys[None], values[None], lengths)
    return out, record, mode.reshape(b, h * g, d), jax.jit(dense_attention)(q, cache)


def test_heads_that_fall_back_leave_the_others_as_they_were():
    """Mixed outcome: dense heads equal the dense mode, the others the same attempt without a ladder."""
    policy = Policy.budget(0.3, "head", codec="int8_int4", max_promoted=0.3)
    q, *_ = problems.originals()
    cache = problems.cache(policy)
    out, record = certify(q, cache, policy)
    dense = np.asarray(record.rung) == 3
    assert dense.any() and not dense.all()
    np.testing.assert_array_equal(np.asarray(out)[dense], np.asarray(jax.jit(dense_attention)(q, cache))[dense])
    # Without a limit on promotion the heads that stayed below it are what they were.
    generous, generous_record = certify(q, cache, dataclasses.replace(policy, max_promoted=1.0))
    others = ~dense & (np.asarray(generous_record.rung) < 3)
    assert others.any()
    np.testing.assert_allclose(np.asarray(out)[others], np.asarray(generous)[others], rtol=0, atol=1e-6)
