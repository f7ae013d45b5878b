"""Inputs at the edge of float32: found by an adversarial reading of the proofs, each was a wrong bound once.

Programs are compiled as in production: never with `quick_compilation`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from certjax import Policy
from tests.oracle import exact_error, f64
from tests.soundness import certify

BARE = dict(sink_tokens=0, recent_tokens=0)
LOOSE = Policy.budget(
    1e30, "absolute", centre="zero", codec="int8_int4", spectral=False, skip_values=False, **BARE
)
FINE = Policy.observe(**BARE)
PAPER = Policy.paper()
SHAPE = (1, 2, 48, 16)
LENGTHS = jnp.asarray([48])


def draw(key_scale, value_scale, query_scale, dtype=jnp.bfloat16):
    a, b, c = jax.random.split(jax.random.key(3), 3)
    keys, values = jax.random.normal(a, SHAPE) * key_scale, jax.random.normal(b, SHAPE) * value_scale
    return jax.random.normal(c, (1, 4, 16)) * query_scale, keys.astype(dtype), values.astype(dtype)


@pytest.mark.parametrize(
    "scales",
    [
        (1.0, 5e37, 1.0),  # the norm of a value overflows a naive square
        (1.0, 5e37, 100.0),
        (1e-38, 1.0, 1e38),  # products of subnormal and huge numbers
        (3e-39, 1.0, 3e37),
        (1e37, 1.0, 3e-39),
        (1e-20, 1e-38, 1.0),
        (1e19, 1e25, 1e-19),
    ],
)
@pytest.mark.parametrize("policy", [LOOSE, PAPER, FINE], ids=["budget", "paper", "planes"])
def test_bound_holds_where_squares_overflow_and_products_vanish(policy, scales):
    inputs = draw(*scales)
    out, record = certify(*inputs, LENGTHS, policy=policy)
    error = exact_error(out, *inputs, LENGTHS)
    assert not np.isnan(record.e_total).any()
    assert (error <= f64(record.e_total)).all()


def test_weight_that_underflows_next_to_a_large_perturbation_is_counted():
    """Two tokens 88 apart by tier 1, so that the lighter has weight 0 in float32; by the originals they are 50 apart,
    and the heavier has value 0: all the output there is comes from the weight that was flushed."""
    keys = np.full(SHAPE, -2000.0, np.float32)
    keys[..., 4:] = 0.0
    keys[..., 0] = 0.0
    for channel in (1, 2, 3):  # a token each that spans the channel's range
        keys[:, :, 2 + channel, channel] = 2000.0
    step = 4000 / 255
    middle = -2000 + 128 * step
    keys[:, :, 0, 1:4] = middle - 0.49 * step  # decoded too high
    keys[:, :, 1, 1:4] = middle + 0.49 * step  # decoded too low
    keys[:, :, 1, 0] = -88.3 * 4
    values = np.ones(SHAPE, np.float32)
    values[:, :, 0] = 0.0
    q = np.zeros((1, 4, 16), np.float32)
    q[..., 0], q[..., 1:4] = 1.0, 3.25
    inputs = tuple(map(jnp.asarray, (q, keys, values)))
    out, record = certify(*inputs, LENGTHS, policy=LOOSE)
    error = exact_error(out, *inputs, LENGTHS)
    assert (error > 1e-24).all() and (np.asarray(record.delta_max) > 18).all()
    assert (error <= f64(record.e_total)).all()


def test_output_whose_square_overflows_is_held_to_its_tolerance():
    policy = Policy.budget(1e-4, "head", sink_tokens=0, recent_tokens=0)
    out, record = certify(*draw(1.0, 1e25, 1.0), LENGTHS, policy=policy)
    np.testing.assert_allclose(record.tolerance, 1e-4 * np.linalg.norm(f64(out), axis=-1), rtol=1e-5)
    assert np.asarray((record.e_total <= record.tolerance) | (record.rung >= 3)).all()
    assert np.asarray(record.canary_ok).all()
