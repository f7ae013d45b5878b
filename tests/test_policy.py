"""`Policy`: its presets, what it refuses, and that it can be static under jit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from certjax import InvalidArgumentError, Policy
from certjax.codecs.affine import Affine
from certjax.codecs.planes import Planes

PRESETS = pytest.mark.parametrize("preset", [Policy.paper, Policy.budget, Policy.observe], ids=lambda p: p.__name__)

# One field, a value outside what it accepts, and whatever the message must say beside the field's name.
REFUSED = [
    ("kind", "greedy", "'paper', 'budget' or 'observe'"),
    ("codec", "fp8", "int8_int4"),
    ("annotations", "float8", "'bfloat16' or 'byte'"),
    ("host_price", 0.0, "positive"),
    ("block_size", 0, "at least 1"),
    ("block_size", -16, "at least 1"),
    ("group_size", 0, "at least 1"),
    ("key_metadata", "float64", "'float32' or 'float16'"),
    ("centre", "median", "'zero', 'mean' or 'auto'"),
    ("sink_tokens", -16, "multiple of block_size=16"),
    ("sink_tokens", 8, "multiple of block_size=16"),
    ("recent_tokens", -1, "multiple of block_size=16"),
    ("recent_tokens", 100, "multiple of block_size=16"),
    ("tier2", "disk", "'host' or 'device'"),
    ("relative_to", "model", "'layer', 'head' or 'absolute'"),
    ("margin", 0.0, r"\(0, 1\]"),
    ("margin", 1.5, r"\(0, 1\]"),
    ("margin", float("nan"), r"\(0, 1\]"),
    ("max_promoted", 0.0, r"\(0, 1\]"),
    ("max_promoted", 1.01, r"\(0, 1\]"),
    ("tau_cov", 0.0, r"\(0, 1\]"),
    ("tau_cov", 2.0, r"\(0, 1\]"),
    ("k_min", 0, "1 <= k_min <= k_max"),
    ("k_min", 129, "1 <= k_min <= k_max"),
    ("k_max", 1, "1 <= k_min <= k_max"),
    ("v_tol", -0.1, "non-negative"),
    ("v_tol", float("nan"), "non-negative"),
    ("rung1_multiplier", 0.5, "at least 1"),
    ("ranking_depth", -1, "non-negative"),
    ("exploration", -0.1, r"\[0, 1\]"),
    ("exploration", 1.1, r"\[0, 1\]"),
    ("scrub", -1, "non-negative"),
]


@pytest.mark.smoke
@PRESETS
@pytest.mark.parametrize(("field", "value", "remedy"), REFUSED, ids=[f"{f}={v}" for f, v, _ in REFUSED])
def test_value_out_of_range_is_refused_by_name_with_what_is_accepted(preset, field, value, remedy):
    with pytest.raises(InvalidArgumentError, match=field) as caught:
        preset(**{"codec": "int8_int4", field: value})  # the codec whose options are checked as well
    caught.match(remedy)


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("tolerance", "0.05", "a number"), ("tolerance", True, "a number"), ("block_size", "16", "an integer"),
        ("block_size", 16.0, "an integer"), ("block_size", None, "an integer"), ("seed", 1.5, "an integer"),
        ("scrub", 2.5, "an integer"), ("canary", 1, "True or False"), ("key_planes", 8, "a tuple of widths"),
        ("margin", "much", "a number"),
    ],
    ids=str,
)  # fmt: skip
def test_value_of_another_type_is_refused_by_name(field, value, what):
    with pytest.raises(InvalidArgumentError, match=f"{field} must be {what}.*, got "):
        Policy.budget(**{field: value})


def test_numbers_of_numpy_and_jax_make_the_policy_that_pythons_make():
    same = Policy.budget(0.5, block_size=16, key_planes=(8, 4))
    other = Policy.budget(jnp.float32(0.5), block_size=np.int64(16), key_planes=[8, np.int32(4)])
    assert same == other and hash(same) == hash(other)


def test_tolerance_that_enforces_nothing_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"tolerance must be finite.*Policy.observe"):
        Policy.budget(float("inf"))


@pytest.mark.parametrize("tolerance", [0, 0.0, -0.05, float("nan"), None])
def test_budget_needs_a_positive_tolerance_and_says_what_is_exact_instead(tolerance):
    with pytest.raises(InvalidArgumentError, match=r"tolerance must be positive.*mode='dense'"):
        Policy.budget(tolerance)


def test_paper_policy_refuses_a_tolerance_because_it_would_not_enforce_it():
    with pytest.raises(InvalidArgumentError, match=r"tolerance.*Policy\.budget"):
        Policy.paper(tolerance=0.05)


def test_exploration_without_the_canary_is_refused_because_nothing_would_read_it():
    with pytest.raises(InvalidArgumentError, match="exploration.*canary=True"):
        Policy.budget(exploration=0.1, canary=False)
    assert Policy.budget(exploration=0.1).canary
    assert not Policy.budget(canary=False).canary


def test_paper_preset_has_the_papers_numbers_and_no_windows():
    policy = Policy.paper()
    assert (policy.kind, policy.tolerance) == ("paper", None)
    assert (policy.tau_cov, policy.k_min, policy.k_max, policy.v_tol) == (0.995, 2, 128, 0.05)
    assert (policy.rung1_threshold, policy.rung1_multiplier, policy.ranking_depth) == (0.02, 2.0, 1)
    assert (policy.sink_tokens, policy.recent_tokens, policy.centre) == (0, 0, "zero")
    assert policy == Policy(kind="paper")


def test_budget_preset_keeps_windows_and_centres_the_values():
    policy = Policy.budget()
    assert (policy.kind, policy.tolerance, policy.relative_to) == ("budget", 0.05, "layer")
    assert (policy.sink_tokens, policy.recent_tokens, policy.centre) == (16, 128, "auto")
    assert policy.ranking_depth == 0


def test_observe_preset_stores_what_budget_stores_and_promises_nothing():
    budget, observe = Policy.budget(), Policy.observe()
    assert observe.make_codec() == budget.make_codec() and observe.tolerance is None
    for name in ("codec", "annotations", "spectral", "centre", "sink_tokens", "recent_tokens", "scrub"):
        assert getattr(observe, name) == getattr(budget, name)


def test_tolerance_and_its_unit_may_be_positional():
    assert Policy.budget(0.1, "head") == Policy.budget(tolerance=0.1, relative_to="head")


OVERRIDES = {
    "block_size": 8,
    "group_size": 8,
    "key_metadata": "float16",
    "sink_tokens": 64,
    "recent_tokens": 256,
    "tier2": "device",
    "margin": 1.0,
    "host_price": 2.0,
    "max_promoted": 1.0,
    "tau_cov": 1.0,
    "k_min": 1,
    "k_max": 256,
    "v_tol": 0.0,
    "rung1_threshold": 0.5,
    "rung1_multiplier": 1.0,
    "ranking_depth": 3,
    "eps_guard": 1e-3,
    "canary": False,
    "exploration": 1.0,
    "seed": 7,
    "scrub": 0,
}


@PRESETS
@pytest.mark.parametrize("field", OVERRIDES)
def test_any_field_of_a_preset_can_be_overridden_without_touching_the_others(preset, field):
    changed = preset(**{field: OVERRIDES[field]})
    assert getattr(changed, field) == OVERRIDES[field] != getattr(preset(), field)
    assert dataclasses.replace(changed, **{field: getattr(preset(), field)}) == preset()


def test_windows_are_checked_against_the_block_size_that_was_asked_for():
    assert Policy.budget(block_size=8, sink_tokens=8, recent_tokens=24).ring_blocks == 4
    with pytest.raises(InvalidArgumentError, match="sink_tokens must be a non-negative multiple of block_size=32"):
        Policy.budget(block_size=32, sink_tokens=16)


@pytest.mark.parametrize(("block_size", "sink", "recent"), [(8, 16, 128), (16, 16, 128), (32, 32, 128), (48, 48, 144)])
def test_preset_windows_are_whole_blocks_of_any_size(block_size, sink, recent):
    policy = Policy.budget(block_size=block_size)
    assert (policy.sink_tokens, policy.recent_tokens) == (sink, recent)


@pytest.mark.parametrize(("recent", "blocks"), [(0, 1), (16, 2), (128, 9)])
def test_ring_holds_the_recent_window_and_the_block_being_filled(recent, blocks):
    assert Policy.paper(recent_tokens=recent).ring_blocks == blocks


def test_codec_is_built_with_the_policys_options():
    assert Policy.paper(group_size=8, key_metadata="float16").make_codec() == Affine(
        group_size=8, key_metadata="float16"
    )
    assert Policy.budget(key_planes=(8,)).make_codec() == Planes((8,), (4, 2))


def test_policy_cannot_be_changed_after_it_was_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Policy.budget().tolerance = -1.0


@pytest.mark.smoke
def test_equal_policies_share_a_trace_and_others_do_not():
    traces = []

    @functools.partial(jax.jit, static_argnames="policy")
    def scaled(x, policy):
        traces.append(policy)
        return x * policy.tolerance

    first, again, other = Policy.budget(0.25), Policy.budget(0.25), Policy.budget(0.5)
    assert first == again and hash(first) == hash(again) and first is not again
    assert first != other and first != Policy.paper()
    for policy in (first, again, other):
        assert float(scaled(jnp.float32(4), policy)) == 4 * policy.tolerance
    assert traces == [first, other]
