import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from certjax import Policy
from certjax.costs import ReadCosts
from certjax.select import budget_plan, further, paper_plan, plan_bytes, tier1_plan

NB = 24
with_rounding = jax.jit(budget_plan, static_argnums=(0, 1))
COSTS = ReadCosts(always=100, keys=(0, 40, 300), values=(0, 40, 60, 300))
EVERYTHING = Policy.budget(0.05, max_promoted=1.0, host_price=1.0, allotment="equal")
masses = st.lists(st.floats(0, 1, width=32), min_size=NB, max_size=NB)


def per_head(x, dtype=jnp.float32):
    return jnp.asarray(x, dtype).reshape(1, 1, 1, -1)


@functools.partial(jax.jit, static_argnums=0)
def paper(policy, mass, eta_max, active):
    return paper_plan(policy, tier1_plan(mass, 0, 1), mass, eta_max, active)


def all_active(n=NB):
    return jnp.ones((1, 1, 1, n), bool)


def plan_by_hand(policy, mass):
    """The paper's rule in plain NumPy: K of each rung."""
    order = np.sort(mass)[::-1].astype(np.float32)
    covered = (1 - mass.sum(dtype=np.float32)) + np.cumsum(order, dtype=np.float32)
    k = int(np.clip((covered < np.float32(policy.tau_cov)).sum() + 1, policy.k_min, policy.k_max))
    k = min(k, mass.size)
    raised = order[k:].sum() > policy.rung1_threshold and k < mass.size
    return int(np.ceil(k * policy.rung1_multiplier)) if raised else k


@given(masses, st.sampled_from([Policy.paper(), Policy.paper(k_max=4), Policy.paper(tau_cov=0.5, k_min=1)]))
def test_paper_policy_promotes_by_descending_mass_up_to_its_coverage(raw, policy):
    mass = np.asarray(raw, np.float32)
    mass = mass / max(mass.sum(), 1.0)
    plan = paper(policy, per_head(mass), jnp.zeros((1, 1, 1, NB)), all_active())
    chosen = np.asarray(plan.keys)[0, 0, 0]
    k = chosen.sum()
    assert abs(int(k) - min(plan_by_hand(policy, mass), NB)) <= 1 or bool(plan.raised[0, 0, 0])
    if 0 < k < NB:
        assert mass[chosen].min() >= mass[~chosen].max()


def test_paper_policy_clamps_k_even_when_all_masses_tie():
    policy = Policy.paper(k_max=5, rung1_multiplier=1.0)
    plan = paper(policy, per_head(np.full(NB, 1 / NB)), jnp.zeros((1, 1, 1, NB)), all_active())
    assert int(plan.keys.sum()) == 5


def test_rung_1_multiplies_k_when_the_clamp_leaves_a_heavy_tail():
    policy = Policy.paper(k_max=5, rung1_multiplier=2.0)
    plan = paper(policy, per_head(np.full(NB, 1 / NB)), jnp.zeros((1, 1, 1, NB)), all_active())
    assert int(plan.keys.sum()) == 10 and bool(plan.raised.all())


def test_rung_2_takes_blocks_whose_mass_times_error_exceeds_the_threshold():
    eta = np.zeros(NB)
    eta[[3, 4]] = 1.0, 0.4
    plan = paper(Policy.paper(v_tol=0.05), per_head(np.full(NB, 0.1)), per_head(eta), all_active())
    assert np.flatnonzero(np.asarray(plan.values)[0, 0, 0]).tolist() == [3]


def budget(policy, costs, keys, values, room, active):
    return with_rounding(policy, costs, keys, values, room, jnp.zeros_like(room), active)


def levels(rng, n_levels, group=1):
    """Terms of a block at each precision, falling; the last, with originals, is 0."""
    first = rng.lognormal(0, 2, (1, 1, group, NB))
    terms = [first * 0.2**i for i in range(n_levels - 1)] + [np.zeros_like(first)]
    return [jnp.asarray(t, jnp.float32) for t in terms]


def chosen(plan):
    """Level of every block as an index into the costs: keys, values `[NB]`."""
    k, v = np.asarray(plan.key_level)[0, 0], np.asarray(plan.value_level)[0, 0]
    k = np.where(np.asarray(plan.keys)[0, 0, 0], len(COSTS.keys) - 1, k)
    return k, np.where(np.asarray(plan.values)[0, 0, 0], len(COSTS.values) - 1, v)


def left(terms, index):
    return np.stack([np.asarray(t, np.float64) for t in terms])[index, 0, 0, :, np.arange(NB)].sum(0)  # [G]


def spent(k, v):
    return np.asarray(COSTS.keys)[k].sum() + np.asarray(COSTS.values)[v].sum()


@given(st.integers(0, 2**31), st.floats(1e-4, 1.5), st.integers(1, 4))
def test_budget_plan_fits_every_head_of_the_group_and_wastes_little(seed, share, group):
    rng = np.random.default_rng(seed)
    keys, values = levels(rng, 3, group), levels(rng, 4, group)
    allowed = jnp.asarray((keys[0] + values[0]).sum(-1) * share * rng.uniform(0.5, 2, (1, 1, group)), jnp.float32)
    plan = budget(EVERYTHING, COSTS, keys, values, allowed, all_active())
    k, v = chosen(plan)
    room = np.asarray(allowed, np.float64)[0, 0]
    assert (left(keys, k) + left(values, v) <= room * (1 + 1e-5)).all()
    # No single step to the next coarser precision that is worth less than the dearest one taken would still fit.
    if group == 1 and share < 1:
        coarser = [
            left(keys, np.where(np.arange(NB) == b, k - 1, k)) + left(values, v) for b in range(NB) if k[b] > 0
        ] + [left(keys, k) + left(values, np.where(np.arange(NB) == b, v - 1, v)) for b in range(NB) if v[b] > 0]
        assert not coarser or max(c[0] for c in coarser) > room[0]


def test_budget_plan_is_optimal_for_what_it_leaves():
    """The relaxation is exact where it is tight: no other choice with the same bytes leaves less (brute force)."""
    rng = np.random.default_rng(3)
    keys = [jnp.where(jnp.arange(NB) < 3, t, 0.0) for t in levels(rng, 3)]
    values = [jnp.where(jnp.arange(NB) < 2, t, 0.0) for t in levels(rng, 4)]
    options = []
    for combo in itertools.product(range(3), range(3), range(3), range(4), range(4)):
        k, v = np.zeros(NB, int), np.zeros(NB, int)
        k[:3], v[:2] = combo[:3], combo[3:]
        options.append((left(keys, k)[0] + left(values, v)[0], spent(k, v)))
    for share in (0.02, 0.1, 0.3, 0.7):
        allowed = (keys[0] + values[0]).sum(-1) * share
        plan = budget(EVERYTHING, COSTS, keys, values, allowed, all_active())
        k, v = chosen(plan)
        remains, bytes_ = left(keys, k)[0] + left(values, v)[0], spent(k, v)
        assert not any(r < remains * (1 - 1e-5) and n <= bytes_ for r, n in options)


@given(st.integers(0, 2**31), st.floats(0.01, 0.9))
def test_pooled_plan_fits_the_layer_and_reads_no_more_than_equal_shares(seed, share):
    rng = np.random.default_rng(seed)
    keys, values = ([jnp.concatenate([t, 3 * t[..., ::-1]], 1) for t in levels(rng, n, 2)] for n in (3, 4))
    room = jnp.full((1, 2, 2), float((keys[0] + values[0]).sum() / 4) * share)
    pooled = with_rounding(
        dataclasses.replace(EVERYTHING, allotment="pooled"), COSTS, keys, values, room, 0.01 * room, all_active()
    )
    equal = with_rounding(EVERYTHING, COSTS, keys, values, room, 0.01 * room, all_active())

    def rest(plan):
        k = np.where(np.asarray(plan.keys)[0, :, 0], 2, np.asarray(plan.key_level)[0])  # [Hkv, NB]
        v = np.where(np.asarray(plan.values)[0, :, 0], 3, np.asarray(plan.value_level)[0])
        both = [
            np.take_along_axis(np.stack([np.asarray(t, np.float64) for t in terms])[:, 0], index[None, :, None], 0)[0]
            for terms, index in ((keys, k), (values, v))
        ]
        return both[0].sum(-1) + both[1].sum(-1) + 0.01 * np.asarray(room)[0], spent(k, v)

    left_pooled, bytes_pooled = rest(pooled)
    left_equal, bytes_equal = rest(equal)
    allowed = float(room[0, 0, 0])
    assert np.sqrt((left_pooled**2).mean()) <= allowed * (1 + 1e-5) and left_equal.max() <= allowed * (1 + 1e-5)
    assert bytes_pooled <= bytes_equal + 2 * 300  # up to a block of either kind


def test_loose_allowance_reads_the_least():
    rng = np.random.default_rng(0)
    plan = budget(EVERYTHING, COSTS, levels(rng, 3), levels(rng, 4), jnp.full((1, 1, 1), 1e9), all_active())
    k, v = chosen(plan)
    assert not k.any() and not v.any() and not plan.give_up.any()
    assert int(plan_bytes(COSTS, plan, all_active())[0, 0]) == NB * COSTS.always


def test_host_price_makes_promotion_the_last_resort():
    rng = np.random.default_rng(1)
    keys, values = levels(rng, 3), levels(rng, 4)
    allowed = (keys[0] + values[0]).sum(-1) * 0.08
    counts = []
    for price in (0.2, 1.0, 8.0, 100.0):
        policy = dataclasses.replace(EVERYTHING, host_price=price)
        plan = budget(policy, COSTS, keys, values, allowed, all_active())
        counts.append(int(plan.keys.sum() + plan.values.sum()))
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]


def test_values_that_may_not_be_skipped_are_read():
    rng = np.random.default_rng(2)
    values = levels(rng, 4)
    values[0] = jnp.full_like(values[0], jnp.inf)
    plan = budget(EVERYTHING, COSTS, levels(rng, 3), values, jnp.full((1, 1, 1), 1e9), all_active())
    assert (np.asarray(plan.value_level) == 1).all()


def test_budget_plan_gives_up_when_promotion_would_cost_more_than_dense():
    flat = [per_head(np.ones(NB)), per_head(np.ones(NB)), per_head(np.zeros(NB))]
    plan = budget(dataclasses.replace(EVERYTHING, max_promoted=0.5), COSTS, flat, [flat[0], *flat], jnp.ones((1, 1, 1)),
                  all_active())  # fmt: skip
    assert bool(plan.give_up.all()) and not plan.keys.any() and not plan.values.any()


def test_head_with_nothing_to_spend_gives_up_and_takes_its_group_along():
    rng = np.random.default_rng(4)
    allowed = jnp.asarray([[[1e9, -1.0]]])
    plan = budget(EVERYTHING, COSTS, levels(rng, 3, 2), levels(rng, 4, 2), allowed, all_active())
    assert bool(plan.give_up.all())


def test_terms_that_are_not_finite_are_promoted():
    keys = [per_head(np.where(np.arange(NB) == 7, np.inf, 0.0))] * 2 + [per_head(np.zeros(NB))]
    plan = budget(EVERYTHING, COSTS, keys, [per_head(np.zeros(NB))] * 4, jnp.ones((1, 1, 1)), all_active())
    assert np.flatnonzero(np.asarray(plan.keys)[0, 0, 0]).tolist() == [7]


@given(st.integers(0, 2**31))
def test_the_finer_of_two_plans_contains_both(seed):
    rng = np.random.default_rng(seed)
    plans = []
    for share in rng.uniform(0.001, 0.5, 2):
        keys, values = levels(rng, 3), levels(rng, 4)
        plans.append(budget(EVERYTHING, COSTS, keys, values, (keys[0] + values[0]).sum(-1) * share, all_active()))
    both = [chosen(p) for p in plans]
    k, v = chosen(further(*plans))
    assert (k == np.maximum(both[0][0], both[1][0])).all() and (v == np.maximum(both[0][1], both[1][1])).all()


def test_blocks_outside_tier_1_are_never_read():
    active = all_active().at[..., ::2].set(False)
    ones = per_head(np.ones(NB))
    terms = [jnp.where(active, t, 0.0) for t in (ones, ones, ones * 0)]
    plans = (
        paper(Policy.paper(k_min=NB, k_max=NB), ones / NB, ones, active),
        budget(EVERYTHING, COSTS, terms, [terms[0], *terms], jnp.full((1, 1, 1), 0.5), active),
    )
    for plan in plans:
        assert plan.keys.any() and not (plan.keys & ~active).any() and not (plan.values & ~active).any()
