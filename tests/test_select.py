import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from certjax import Policy
from certjax.select import budget_plan, paper_plan

NB = 24
paper = jax.jit(paper_plan, static_argnums=0)
budget = jax.jit(budget_plan, static_argnums=0)
masses = st.lists(st.floats(0, 1, width=32), min_size=NB, max_size=NB)


def per_head(x, dtype=jnp.float32):
    return jnp.asarray(x, dtype).reshape(1, 1, 1, -1)


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


@given(masses, masses, st.floats(0.01, 1.0))
def test_budget_policy_leaves_at_most_the_tolerance_and_no_term_larger_than_a_promoted_one(keys, values, share):
    policy = Policy.budget(0.05, max_promoted=1.0, margin=1.0)
    terms = np.concatenate([keys, values]).astype(np.float32)
    tolerance = jnp.full((1, 1, 1), max(terms.sum() * share, 1e-6), jnp.float32)
    plan = budget(policy, per_head(keys), per_head(values), jnp.zeros((1, 1, 1)), jnp.ones((1, 1, 1), bool), tolerance,
                  all_active())  # fmt: skip
    chosen = np.concatenate([np.asarray(plan.keys).ravel(), np.asarray(plan.values).ravel()])
    assert terms[~chosen].sum(dtype=np.float64) <= float(tolerance[0, 0, 0]) * (1 + 1e-5)
    if chosen.any() and not chosen.all():
        smallest = terms[chosen].min()
        assert smallest >= terms[~chosen].max()
        # Nothing is promoted in vain: with the smallest promoted terms left out too, the budget is exceeded.
        without = ~chosen | (terms == smallest)
        assert terms[without].sum(dtype=np.float64) >= float(tolerance[0, 0, 0]) * (1 - 1e-5)


def test_budget_policy_gives_up_when_promotion_would_cost_more_than_dense():
    flat = per_head(np.ones(NB))
    plan = budget(Policy.budget(0.05, max_promoted=0.5), flat, flat, jnp.zeros((1, 1, 1)), jnp.ones((1, 1, 1), bool),
                  jnp.full((1, 1, 1), 1.0), all_active())  # fmt: skip
    assert bool(plan.give_up.all()) and not bool(plan.any)


def test_budget_policy_leaves_heads_within_tolerance_alone():
    flat = per_head(np.ones(NB))
    plan = budget(Policy.budget(0.05), flat, flat, jnp.zeros((1, 1, 1)), jnp.zeros((1, 1, 1), bool),
                  jnp.full((1, 1, 1), 1.0), all_active())  # fmt: skip
    assert not bool(plan.any) and not bool(plan.give_up.any())


def test_budget_policy_promotes_blocks_whose_terms_are_not_numbers():
    terms = np.zeros(NB)
    terms[7] = np.nan
    plan = budget(Policy.budget(0.05), per_head(terms), per_head(np.zeros(NB)), jnp.zeros((1, 1, 1)),
                  jnp.ones((1, 1, 1), bool), jnp.full((1, 1, 1), 1.0), all_active())  # fmt: skip
    assert not bool(plan.keys[0, 0, 0, 7]) or int(plan.keys.sum()) >= 1


def test_blocks_outside_tier_1_are_never_promoted():
    active = all_active().at[..., ::2].set(False)
    ones, none = per_head(np.ones(NB)), jnp.zeros((1, 1, 1))
    plans = (
        paper(Policy.paper(k_min=NB, k_max=NB), ones / NB, ones, active),
        budget(Policy.budget(0.05, max_promoted=1.0), ones, ones, none, none == 0, none + 0.5, active),
    )
    for plan in plans:
        assert plan.any and not (plan.keys & ~active).any() and not (plan.values & ~active).any()
