"""Quantize and dequantize: every registered codec is held to the contract."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from certjax import InvalidArgumentError
from certjax.codecs import REGISTRY, annotate, fingerprint, make_codec
from tests.adversarial import FAMILIES
from tests.oracle import f64

B, D = 16, 32
OPTIONS = ({}, {"key_metadata": "float16"}, {"group_size": 8})
codecs = pytest.mark.parametrize(
    "codec", [make_codec(name, **options) for name in sorted(REGISTRY) for options in OPTIONS], ids=str
)


@functools.partial(jax.jit, static_argnums=0)
def _encode(codec, keys, values, centre):
    codes = codec.encode(keys, values)
    return codes, annotate(codec, keys, values, centre, codes)


def encode(codec, keys, values, centre=None):
    return _encode(codec, keys, values, jnp.zeros(keys.shape[-1]) if centre is None else centre)


decode_keys = jax.jit(lambda codec, codes: codec.decode_keys(codes), static_argnums=0)
decode_values = jax.jit(lambda codec, codes: codec.decode_values(codes), static_argnums=0)
channel_bound = jax.jit(lambda codec, abs_q, codes: codec.channel_bound(abs_q, codes), static_argnums=0)


def block(seed, family, scale=1.0, dtype=np.float16, n_blocks=2):
    rng = np.random.default_rng(seed)
    x = np.clip(FAMILIES[family](rng, (n_blocks, B, D)) * scale, -65504, 65504)
    return jnp.asarray(x.astype(dtype), jnp.float32)


cases = given(
    st.integers(0, 2**31), st.sampled_from(sorted(FAMILIES)), st.sampled_from(sorted(FAMILIES)),
    st.sampled_from([1e-7, 1e-3, 1.0, 1e3]),
)  # fmt: skip


@codecs
@settings(max_examples=60)
@cases
def test_annotations_are_never_below_the_true_residuals(codec, seed, key_family, value_family, scale):
    keys, values = block(seed, key_family, scale), block(seed + 1, value_family, scale)
    centre = jnp.asarray(np.random.default_rng(seed).standard_normal(D), jnp.float32)
    codes, notes = encode(codec, keys, values, centre)
    k_hat, v_hat = f64(decode_keys(codec, codes)), f64(decode_values(codec, codes))
    assert (np.linalg.norm(f64(keys) - k_hat, axis=-1) <= f64(notes.kappa)).all()
    assert (np.linalg.norm(f64(values) - v_hat, axis=-1) <= f64(notes.eta)).all()
    assert (np.linalg.norm(f64(values) - f64(centre), axis=-1) <= f64(notes.nu)).all()
    reach = np.maximum(np.linalg.norm(f64(keys), axis=-1), np.linalg.norm(k_hat, axis=-1))
    assert (reach.max(-1) <= f64(notes.k_norm)).all()


@codecs
@settings(max_examples=60)
@cases
def test_decoded_tensors_are_finite_for_finite_input(codec, seed, key_family, value_family, scale):
    codes, notes = encode(codec, block(seed, key_family, scale), block(seed, value_family, scale))
    for x in (decode_keys(codec, codes), decode_values(codec, codes), notes.kappa, notes.eta):
        assert np.isfinite(f64(x)).all()


@codecs
@settings(max_examples=60)
@cases
def test_channel_bound_holds_for_any_query(codec, seed, key_family, value_family, scale):
    keys = block(seed, key_family, scale)
    codes, _ = encode(codec, keys, keys)
    q = jnp.asarray(np.random.default_rng(seed).standard_normal((3, D)), jnp.float32)
    bound = f64(channel_bound(codec, jnp.abs(q), codes))  # [3, n_blocks]
    gap = np.abs(np.einsum("gd,nbd->gnb", f64(q), f64(keys) - f64(decode_keys(codec, codes)))).max(-1)
    assert (gap <= bound).all()


def test_int8_keys_are_within_half_a_step_of_gaussian_input():
    codec = make_codec("int8_int4")
    keys = block(0, "gaussian")
    codes, _ = encode(codec, keys, keys)
    half = 0.5 * f64(codes.k_scale)[:, None]
    assert (np.abs(f64(keys) - f64(codec.decode_keys(codes))) <= half * (1 + 1e-4)).all()
    assert (f64(codes.k_reach) <= 1.02).all()


def test_int4_values_are_within_half_a_step_of_gaussian_input():
    codec = make_codec("int8_int4")
    values = block(0, "gaussian")
    codes, _ = encode(codec, values, values)
    # The float16 scale and offset add a little to the half step of 1/15 of the range.
    half = 0.5 * np.repeat(f64(codes.v_scale), 16, -1) + 2e-3
    assert (np.abs(f64(values) - f64(codec.decode_values(codes))) <= half).all()


@pytest.mark.parametrize("metadata", ["float32", "float16"])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 65504.0, 6e-8])
def test_constant_block_round_trips_exactly(metadata, value):
    codec = make_codec("int8_int4", key_metadata=metadata)
    x = jnp.full((1, B, D), np.float16(value), jnp.float32)
    codes, _ = encode(codec, x, x)
    np.testing.assert_array_equal(codec.decode_keys(codes), x)
    np.testing.assert_array_equal(codec.decode_values(codes), x)


def test_constant_channel_round_trips_beside_varying_ones():
    codec = make_codec("int8_int4")
    x = block(1, "gaussian").at[..., 5].set(2.25)
    codes, _ = encode(codec, x, x)
    np.testing.assert_array_equal(codec.decode_keys(codes)[..., 5], x[..., 5])


def test_quantizing_decoded_keys_again_changes_nothing_but_rounding():
    codec = make_codec("int8_int4")
    x = block(2, "gaussian")
    once = codec.decode_keys(encode(codec, x, x)[0])
    twice = codec.decode_keys(encode(codec, once, once)[0])
    np.testing.assert_allclose(once, twice, rtol=0, atol=1e-5)


def test_packed_values_take_half_a_byte_each():
    codes = make_codec("int8_int4").encode(block(0, "gaussian"), block(0, "gaussian"))
    assert codes.v_codes.shape == (2, B, D // 2) and codes.v_codes.dtype == jnp.uint8


@pytest.mark.parametrize("leaf", ["k_codes", "k_scale", "k_zero", "k_reach", "v_codes", "v_scale", "v_zero"])
def test_fingerprint_notices_one_changed_element_of_codes(leaf):
    codec = make_codec("int8_int4")
    codes, notes = encode(codec, block(0, "gaussian"), block(1, "gaussian"))
    x = getattr(codes, leaf)
    changed = codes.replace(**{leaf: x.at[(1, *[0] * (x.ndim - 1))].add(1)})
    assert (fingerprint(changed, notes) == notes.checksum).tolist() == [True, False]


@pytest.mark.parametrize("leaf", ["kappa", "eta", "nu", "k_norm"])
def test_fingerprint_notices_a_changed_annotation(leaf):
    codec = make_codec("int8_int4")
    codes, notes = encode(codec, block(0, "gaussian"), block(1, "gaussian"))
    stale = notes.replace(**{leaf: getattr(notes, leaf) * 0.5})
    assert (fingerprint(codes, stale) != notes.checksum).all()


def test_unknown_codec_is_refused_with_the_names_that_exist():
    with pytest.raises(InvalidArgumentError, match="int8_int4"):
        make_codec("int3")


@pytest.mark.parametrize("d, group", [(33, 16), (24, 16)])
def test_head_dim_that_groups_do_not_divide_is_refused(d, group):
    with pytest.raises(InvalidArgumentError, match="head dim"):
        make_codec("int8_int4", group_size=group).encode(jnp.zeros((B, d)), jnp.zeros((B, d)))
