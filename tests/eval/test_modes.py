"""Modes as text: what they mean, and what is refused with a message that names the remedy."""

import pytest

from certjax import InvalidArgumentError, Policy
from certjax.eval.modes import PRESETS, parse_mode, parse_modes

MEANINGS = {
    "naive": Policy.observe(),
    "paper": Policy.paper(),
    "budget": Policy.budget(),
    "budget:tolerance=0.02": Policy.budget(0.02),
    "budget:relative_to=head,margin=1": Policy.budget(0.05, "head", margin=1.0),
    "naive:codec=kivi_int2,group_size=16,sink_tokens=0,recent_tokens=0": Policy.observe(
        codec="kivi_int2", group_size=16, sink_tokens=0, recent_tokens=0
    ),
    "budget:key_planes=4+2,value_planes=8,spectral=false": Policy.budget(
        key_planes=(4, 2), value_planes=(8,), spectral=False
    ),
    "paper:v_tol=1e-3,k_max=64,canary=False,key_metadata=float16": Policy.paper(
        v_tol=1e-3, k_max=64, canary=False, key_metadata="float16"
    ),
    "naive:tier2=device": Policy.observe(tier2="device"),
    "budget:tolerance=0.02,tier2=device": Policy.budget(0.02, tier2="device"),
    "paper:group_size=none, codec=int8_int8": Policy.paper(codec="int8_int8"),
}


@pytest.mark.parametrize("text", MEANINGS)
def test_mode_is_a_preset_with_the_fields_that_are_named(text):
    mode = parse_mode(text)
    assert (mode.kind, mode.policy, mode.label) == ("certified", MEANINGS[text], text)


def test_dense_mode_is_dense_whatever_its_policy():
    mode = parse_mode(" dense ")
    assert (mode.kind, mode.label) == ("dense", "dense")
    assert mode.to_dict() == {"kind": "dense", "policy": None}


def test_two_ways_to_write_a_mode_are_one_configuration():
    assert parse_mode("budget").to_dict() == parse_mode("budget:tolerance=0.05").to_dict()
    assert parse_mode("budget").to_dict() != parse_mode("budget:tolerance=0.04").to_dict()


REFUSED = {
    "sparse": ["unknown name 'sparse'", *PRESETS],
    "dense:codec=planes": ["dense attention has no options"],
    "budget:": ["field=value"],
    "budget:tolerance": ["'tolerance'", "field=value"],
    "budget:tol=0.1": ["unknown field 'tol'", "tolerance"],
    "budget:kind=paper": ["unknown field 'kind'"],
    "budget:tolerance=small": ["tolerance must be a number, or none", "'small'"],
    "budget:tolerance=0": ["tolerance must be positive"],
    "paper:k_max=1.5": ["k_max must be an integer", "'1.5'"],
    "paper:canary=1": ["canary must be true or false", "'1'"],
    "paper:codec=fp4": ["codec must be one of", "planes", "'fp4'"],
    "budget:key_planes=8x4": ["key_planes must be integers joined by +, such as 8+4"],
    "budget:annotations=int8": ["annotations must be one of bfloat16, byte"],
    "budget:tier2=disk": ["tier2 must be one of host, device", "'disk'"],
    "paper:tolerance=0.1": ["tolerance has no effect in mode paper"],
    "naive:canary=false": ["canary has no effect in mode naive"],
    "budget:k_max=4": ["k_max has no effect in mode budget"],
    "budget:group_size=16": ["group_size is no option of codec=planes"],
    "paper:k_max=4,k_max=8": ["k_max is given twice"],
    "budget:sink_tokens=5": ["sink_tokens", "multiple of block_size"],
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_wrong_with_a_mode_is_named(text):
    with pytest.raises(InvalidArgumentError) as refused:
        parse_mode(text)
    for part in (f"mode {text!r}", *REFUSED[text]):
        assert part in str(refused.value)


def test_modes_are_parsed_in_order_and_each_is_given_once():
    assert [mode.label for mode in parse_modes(["paper", "dense"])] == ["paper", "dense"]
    with pytest.raises(InvalidArgumentError, match="'dense' is given twice"):
        parse_modes(["dense", "naive", " dense"])
    with pytest.raises(InvalidArgumentError, match="no mode is given"):
        parse_modes([])
