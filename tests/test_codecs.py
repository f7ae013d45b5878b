"""Quantize and dequantize: every registered codec is held to the contract."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from certjax import InvalidArgumentError, Policy, TieredKVCache
from certjax.codecs import REGISTRY, HeadStats, annotate, fingerprint, make_codec
from certjax.codecs import decode_keys as decode_keys_at
from certjax.codecs import decode_values as decode_values_at
from certjax.codecs import notes as nt
from certjax.codecs.base import LARGE_BLOCK
from certjax.codecs.rotation import rotate, rounding, unrotate
from tests import problems
from tests.adversarial import FAMILIES
from tests.oracle import f64

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, D = 16, 32
N_BLOCKS = 6
FORMS = ("bfloat16", "byte")
OPTIONS = (
    {}, {"key_metadata": "float16"}, {"group_size": 8}, {"fp8_scale": "head"}, {"rotate": False}, {"refine": False},
    {"key_planes": (8,), "value_planes": (4,)}, {"key_planes": (4, 4, 4), "value_planes": (2, 2, 2)},
)  # fmt: skip
EVERY = list(dict.fromkeys(make_codec(name, **options) for name in sorted(REGISTRY) for options in OPTIONS))
ALWAYS = {*map(make_codec, REGISTRY), *(c for c in EVERY if c.name in ("planes", "fp8_e4m3", "int8_int4"))}
"""Formats that differ from `int8_int4` in their widths have their options varied in long runs only."""
CODECS = [pytest.param(c, id=str(c), marks=() if c in ALWAYS else pytest.mark.long) for c in EVERY]
codecs = pytest.mark.parametrize("codec", CODECS)
with_channel_steps = pytest.mark.parametrize("codec", [c for c in CODECS if hasattr(c.values[0], "key_metadata")])


@functools.partial(jax.jit, static_argnums=0)
def _encode(codec, keys, values, stats):
    """Codes and, by form, annotations: one program a codec, as few shapes as possible, for all tests."""
    codes = codec.encode(keys, values, stats)
    return codes, {form: annotate(codec, keys, values, stats, codes, form=form, spectral=True) for form in FORMS}


def stats_of(keys, values, centre=0.0):
    """Statistics of one KV head that has been seen."""
    there = jnp.broadcast_to(jnp.asarray(centre, jnp.float32), (D,))
    return HeadStats(there, there, jnp.abs(keys).max(), jnp.abs(values).max())


NOWHERE = HeadStats(jnp.zeros(D), jnp.zeros(D), jnp.ones(()), jnp.ones(()))


def encode(codec, keys, values, stats=NOWHERE, form="bfloat16"):
    codes, notes = _encode(codec, keys, values, stats)
    return codes, notes[form]


def decode_keys(codec, codes, stats=NOWHERE, level=-1):
    return _decode(codec, codes, stats)[0][level]


def decode_values(codec, codes, stats=NOWHERE, level=-1):
    return _decode(codec, codes, stats)[1][level]


@functools.partial(jax.jit, static_argnums=0)
def _decode(codec, codes, stats):
    """Keys and values at every level."""
    keys = [decode_keys_at(codec, codes, stats, level) for level in range(codec.key_levels)]
    return keys, [decode_values_at(codec, codes, stats, level) for level in range(codec.value_levels)]


@functools.partial(jax.jit, static_argnums=0)
def _decode_fixed(codec, codes):
    """As `_decode`, in the codec's basis."""
    return [[decode(codes, i) for i in range(n)] for decode, n in _levels(codec)]


@functools.partial(jax.jit, static_argnums=0)
def _decode_mixed(codec, codes, levels):
    return [decode(codes, level) for (decode, _), level in zip(_levels(codec), levels, strict=True)]


def _levels(codec):
    return (codec.keys, codec.key_levels), (codec.values, codec.value_levels)


channel_bound = jax.jit(lambda codec, abs_q, codes: codec.channel_bound(abs_q, codes), static_argnums=0)


def block(seed, family, scale=1.0, dtype=np.float16, n_blocks=N_BLOCKS):
    rng = np.random.default_rng(seed)
    x = np.clip(FAMILIES[family](rng, (n_blocks, B, D)) * scale, -65504, 65504)
    return jnp.asarray(x.astype(dtype), jnp.float32)


cases = given(
    st.integers(0, 2**31), st.sampled_from(sorted(FAMILIES)), st.sampled_from(sorted(FAMILIES)),
    st.sampled_from([1e-7, 1e-3, 1.0, 1e3]),
)  # fmt: skip


@codecs
@settings(max_examples=40)
@cases
def test_annotations_are_never_below_the_true_residuals(codec, seed, key_family, value_family, scale):
    keys, values = block(seed, key_family, scale), block(seed + 1, value_family, scale)
    # Half of the blocks is beyond what the statistics know of: tokens that came later.
    stats = stats_of(keys[:3], values[:3], np.random.default_rng(seed).standard_normal(D))
    codes, _ = encode(codec, keys, values, stats)
    true = true_residuals(codec, codes, keys, values, stats)
    for form in FORMS:
        _, notes = encode(codec, keys, values, stats, form)
        for name, exact in true.items():
            assert (exact <= f64(nt.read(getattr(notes, name)))).all(), (form, name)


@pytest.mark.parametrize("codec", [make_codec("planes"), make_codec("planes", rotate=False)], ids=str)
@settings(max_examples=40)
@cases
def test_rho_times_a_tokens_step_is_never_below_its_residual(codec, seed, key_family, value_family, scale):
    """And costs little: blocks large enough to have one, of tokens of very different lengths, some of them zero."""
    rng = np.random.default_rng(seed)
    keys, values = (
        jnp.concatenate(list(block(seed + i, family, scale, n_blocks=LARGE_BLOCK // B)))[None]
        for i, family in enumerate((key_family, value_family))
    )
    values = values * jnp.asarray(10.0 ** rng.uniform(-3, 0, (1, LARGE_BLOCK, 1)), jnp.float32).at[0, 5].set(0.0)
    codes, notes = encode(codec, keys, values)
    true = true_residuals(codec, codes, keys, values, NOWHERE)
    for rho, step, residual, widths in (
        (notes.rho_k, codes.k_scale, true["kappa"], codec.key_planes),
        (notes.rho_v, codes.v_scale, true["eta"], codec.value_planes),
    ):
        rho, step = f64(rho)[..., None], f64(step)[:, None]  # [1, Lv, 1], [1, 1, B]
        reach = np.where(np.isinf(rho), np.inf, np.where(np.isinf(rho), 0, rho) * step)
        assert (residual <= reach).all()
        if ((step > 2.0**-50) | (residual.max(1) == 0)).all():  # about a cell's diagonal at the level's width
            cells = np.array([2.0 ** (sum(widths) - n) for n in np.cumsum(widths)])
            assert (rho[0, :, 0] <= 1.02 * cells * np.sqrt(D)).all(), rho


def test_small_blocks_have_no_rho():
    _, notes = encode(make_codec("planes"), block(0, "gaussian"), block(1, "gaussian"))
    assert notes.rho_k is None and notes.rho_v is None


def true_residuals(codec, codes, keys, values, stats):
    """What the annotations bound, by name, in float64."""
    keys, values = f64(keys), f64(values)
    centre = f64(stats.key_centre) if codec.centred else 0.0
    from_centre = values - f64(stats.value_centre)
    k_hat = [f64(decode_keys(codec, codes, stats, level)) for level in range(codec.key_levels)]
    v_hat = [f64(decode_values(codec, codes, stats, level)) for level in range(codec.value_levels)]

    def norms(differences):  # of tokens
        return np.stack([np.linalg.norm(x, axis=-1) for x in differences], 1)

    def spectral(differences):  # of blocks
        return np.stack([np.linalg.norm(x, 2, axis=(-2, -1)) for x in differences], 1)

    return {
        "kappa": norms([keys - x for x in k_hat]),
        "eta": norms([values - x for x in v_hat]),
        "nu": np.linalg.norm(from_centre, axis=-1),
        "k_norm": norms([x - centre for x in (keys, *k_hat)]).max((1, 2)),
        "sigma_k": spectral([keys - x for x in k_hat]),
        "sigma_v": spectral([from_centre, *(values - x for x in v_hat)]),
    }


@settings(max_examples=100)
@given(st.integers(0, 2**31), st.floats(-38, 38), st.floats(0, 12))
def test_bytes_round_up_and_cost_little(seed, exponent, spread):
    x = np.abs(np.random.default_rng(seed).standard_normal((5, B)) * 10.0 ** exponent)
    x = jnp.asarray(x * 10.0 ** -np.random.default_rng(seed).uniform(0, spread, (5, B)), jnp.float32)
    note = nt.store(x, "byte")
    back = f64(nt.read(note))
    normal = f64(x) > 1e-37  # what is subnormal may be flushed: the absolute floor of the bound is there for it
    assert (back >= f64(x))[normal].all()
    assert (back - f64(x) <= 1.01 / 255 * f64(nt.block_peak(note))[:, None])[normal].all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_annotation_that_is_not_finite_stays_so(form, bad):
    x = jnp.ones((2, B)).at[1, 3].set(bad)
    back = np.asarray(nt.read(nt.store(x, form)))
    assert not np.isfinite(back[1, 3]) and np.isfinite(back[0]).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "codec",
    [pytest.param(*c.values, marks=pytest.mark.smoke if "planes" in c.values else c.marks) for c in problems.CODECS],
)
def test_annotations_hold_when_the_originals_are_rounded_in_the_same_program(codec, dtype):
    """XLA may drop a cast to a narrow type and back: what is measured must be what is stored all the same."""
    policy = Policy.budget(0.05, codec=codec, key_metadata="float16", sink_tokens=0, recent_tokens=0)
    a, b = jax.random.split(jax.random.key(0))
    keys, values = (jax.random.normal(x, (1, 2, 64, 32)) * 1e-3 for x in (a, b))

    @jax.jit
    def build(keys, values):
        return TieredKVCache.from_prefill(keys.astype(dtype), values.astype(dtype), policy, capacity=64)

    cache = build(keys, values)
    stored = (f64(x).reshape(1, 2, 4, 16, 32) for x in (cache.host_keys, cache.host_values))
    decoded = (levels[-1] for levels in _decode(cache.codec, cache.codes, cache.stats))
    for original, hat, note in zip(stored, decoded, (cache.notes.kappa, cache.notes.eta), strict=True):
        assert (np.linalg.norm(original - f64(hat), axis=-1) <= f64(nt.read(note)[..., -1, :])).all()


@codecs
def test_level_per_block_equals_the_static_level(codec):
    codes, _ = encode(codec, block(5, "gaussian"), block(6, "gaussian"))
    levels = [np.arange(N_BLOCKS) % n for _, n in _levels(codec)]
    mixed, fixed = _decode_mixed(codec, codes, levels), _decode_fixed(codec, codes)
    for level, some, each in zip(levels, mixed, fixed, strict=True):
        for i, whole in enumerate(each):
            np.testing.assert_array_equal(np.asarray(some)[level == i], np.asarray(whole)[level == i])


@codecs
def test_finer_levels_are_closer(codec):
    keys, values = block(7, "gaussian"), block(8, "gaussian")
    _, notes = encode(codec, keys, values, stats_of(keys, values))
    for note in (notes.kappa, notes.eta):
        x = f64(nt.read(note))
        assert (x[:, 1:] < x[:, :-1]).all()


@codecs
@settings(max_examples=60)
@cases
def test_decoded_tensors_are_finite_for_finite_input(codec, seed, key_family, value_family, scale):
    codes, notes = encode(codec, block(seed, key_family, scale), block(seed, value_family, scale))
    for x in (decode_keys(codec, codes), decode_values(codec, codes), nt.read(notes.kappa), nt.read(notes.eta)):
        assert np.isfinite(f64(x)).all()


@with_channel_steps
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
    assert (np.abs(f64(keys) - f64(decode_keys(codec, codes))) <= half * (1 + 1e-4)).all()
    assert (f64(codes.k_reach) <= 1.02).all()


def test_int4_values_are_within_half_a_step_of_gaussian_input():
    codec = make_codec("int8_int4")
    values = block(0, "gaussian")
    codes, _ = encode(codec, values, values)
    # The float16 scale and offset add a little to the half step of 1/15 of the range.
    half = 0.5 * np.repeat(f64(codes.v_scale), 16, -1) + 2e-3
    assert (np.abs(f64(values) - f64(decode_values(codec, codes))) <= half).all()


@pytest.mark.parametrize("metadata", ["float32", "float16"])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 65504.0, 6e-8])
def test_constant_block_round_trips_exactly(metadata, value):
    codec = make_codec("int8_int4", key_metadata=metadata)
    x = jnp.full((N_BLOCKS, B, D), np.float16(value), jnp.float32)
    codes, _ = encode(codec, x, x)
    np.testing.assert_array_equal(decode_keys(codec, codes), x)
    np.testing.assert_array_equal(decode_values(codec, codes), x)


def test_constant_channel_round_trips_beside_varying_ones():
    codec = make_codec("int8_int4")
    x = block(1, "gaussian").at[..., 5].set(2.25)
    codes, _ = encode(codec, x, x)
    np.testing.assert_array_equal(decode_keys(codec, codes)[..., 5], x[..., 5])


def test_quantizing_decoded_keys_again_changes_nothing_but_rounding():
    codec = make_codec("int8_int4")
    x = block(2, "gaussian")
    once = decode_keys(codec, encode(codec, x, x)[0])
    twice = decode_keys(codec, encode(codec, once, once)[0])
    np.testing.assert_allclose(once, twice, rtol=0, atol=1e-5)


def test_packed_values_take_half_a_byte_each():
    codes, _ = encode(make_codec("int8_int4"), block(0, "gaussian"), block(0, "gaussian"))
    assert codes.v_codes.shape == (N_BLOCKS, B, D // 2) and codes.v_codes.dtype == jnp.uint8


@pytest.mark.parametrize("leaf", ["k_codes", "k_scale", "k_zero", "k_reach", "v_codes", "v_scale", "v_zero"])
def test_fingerprint_notices_one_changed_element_of_codes(leaf):
    codec = make_codec("int8_int4")
    codes, notes = encode(codec, block(0, "gaussian"), block(1, "gaussian"))
    x = getattr(codes, leaf)
    changed = codes.replace(**{leaf: x.at[(1, *[0] * (x.ndim - 1))].add(1)})
    assert (fingerprint(changed, notes) == notes.checksum).tolist() == [True, False, *[True] * (N_BLOCKS - 2)]


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
        make_codec("int8_int4", group_size=group).encode(jnp.zeros((B, d)), jnp.zeros((B, d)), NOWHERE)


@pytest.mark.parametrize("d", [1, 3, 32, 64, 80, 96, 128, 256])
def test_rotation_is_orthogonal_within_its_rounding(d):
    x = jax.random.normal(jax.random.key(d), (50, d))
    there = jax.jit(rotate)(x)
    norms = np.linalg.norm(f64(x), axis=-1)
    np.testing.assert_allclose(np.linalg.norm(f64(there), axis=-1), norms, rtol=rounding(d))
    back = np.linalg.norm(f64(jax.jit(unrotate)(there)) - f64(x), axis=-1)
    assert (back <= 2 * rounding(d) * norms).all()


@pytest.mark.parametrize("d", [64, 80, 96, 128])
def test_rotation_spreads_a_single_channel_over_all(d):
    spread = np.abs(f64(rotate(jnp.eye(d))))
    assert spread.max() <= 1.5 / np.sqrt(d) * 1.001


def test_dropping_the_low_plane_leaves_the_coarser_code():
    keys, values = block(3, "gaussian"), block(4, "gaussian")
    fine, _ = encode(make_codec("planes"), keys, values)
    coarse, _ = encode(make_codec("planes", key_planes=(8,), value_planes=(4,)), keys, values)
    np.testing.assert_array_equal(fine.k_planes[0], coarse.k_planes[0])
    np.testing.assert_array_equal(fine.v_planes[0], coarse.v_planes[0])
    np.testing.assert_array_equal(fine.k_scale * 16, coarse.k_scale)


def test_twelve_bit_keys_are_sixteen_times_closer_than_eight_bit_keys():
    keys = block(3, "gaussian")
    error = []
    for widths in ((8,), (8, 4)):
        codec = make_codec("planes", key_planes=widths)
        codes, _ = encode(codec, keys, keys)
        error.append(np.linalg.norm(f64(keys) - f64(decode_keys(codec, codes))))
    assert 15 < error[0] / error[1] < 17


@pytest.mark.parametrize("widths", [(), (3,), (8, 8, 1), (0,)])
def test_planes_of_other_widths_are_refused(widths):
    with pytest.raises(InvalidArgumentError, match="key_planes"):
        make_codec("planes", key_planes=widths)


def test_head_dim_that_does_not_fill_bytes_is_refused():
    with pytest.raises(InvalidArgumentError, match="whole bytes"):
        codec = make_codec("planes", key_planes=(1,))
        nowhere = HeadStats(jnp.zeros(4), jnp.zeros(4))
        codec.encode(jnp.zeros((1, B, 4)), jnp.zeros((1, B, 4)), nowhere)
