"""No certificate is below the true error: adversarial inputs, random and by hypothesis.

Programs are compiled as in production: never with `quick_compilation`.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import adversarial as adv
from tests import soundness

SEARCHES = [
    pytest.param(policy, dtype, id=f"{name}-{dtype}", marks=() if always else pytest.mark.long)
    for name, policy in adv.POLICIES.items()
    for dtype in adv.DTYPES
    for always in [name in adv.SEARCHED and dtype in adv.CORE[name]]
]


@pytest.mark.parametrize(("policy", "dtype"), SEARCHES)
@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**32 - 1),
    key_family=st.sampled_from(sorted(adv.FAMILIES)),
    value_family=st.sampled_from(sorted(adv.FAMILIES)),
    query_scale=st.sampled_from(adv.QUERY_SCALES),
    key_scale=st.sampled_from(adv.DATA_SCALES),
    value_scale=st.sampled_from(adv.DATA_SCALES),
)
def test_bound_holds_for_inputs_that_hypothesis_finds(policy, dtype, seed, **choice):
    result = soundness.check(adv.draw(np.random.default_rng(seed), policy, dtype=dtype, **choice), policy)
    assert not result["violation"].any()
    assert not result["contract"].any()
    assert not result["canary"].any()  # a canary alarm on an intact cache would be a bound that does not hold


@pytest.mark.parametrize("key_family", sorted(adv.FAMILIES))
@pytest.mark.parametrize("dtype", sorted(adv.DTYPES))
def test_bound_holds_for_every_family_at_every_query_scale(key_family, dtype):
    rng = np.random.default_rng(11)
    for query_scale in adv.QUERY_SCALES:
        for policy in (adv.POLICIES["planes_whole"], adv.POLICIES["paper"]):
            inputs = adv.draw(rng, policy, key_family, key_family, query_scale, 1.0, 1.0, dtype)
            assert not soundness.check(inputs, policy)["violation"].any()


def test_twenty_thousand_head_steps_have_no_violation():
    totals = soundness.run(20_000, seed=1, progress=False, policies=adv.CORE)
    assert totals["head_steps"] >= 20_000
    assert totals["violations"] == totals["contract_broken"] == totals["canary_alarms"] == 0
    # The run means something only if every rung was climbed on the way.
    assert all(totals[f"rung_{r}"] > 250 for r in (0, 1, 2, 3))


@pytest.mark.long
def test_a_million_head_steps_have_no_violation():
    totals = soundness.run(1_000_000, seed=2, progress=False)
    assert totals["violations"] == totals["contract_broken"] == totals["canary_alarms"] == 0


def test_the_harness_notices_an_unsound_bound(monkeypatch):
    """Mutation: a quarter of every bound, and violations must appear."""
    certify = soundness.certify

    def quartered(*inputs, **rest):
        out, record = certify(*inputs, **rest)
        return out, record.replace(e_total=record.e_total * 0.25)

    monkeypatch.setattr(soundness, "certify", quartered)
    totals = soundness.run(5_000, seed=3, progress=False, policies=adv.CORE)
    assert totals["violations"] > 0
