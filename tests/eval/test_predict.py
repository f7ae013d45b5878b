"""What a bound says of the harm: observations from records, areas, operating points, curves."""

import dataclasses

import numpy as np
import pytest

from certjax.errors import InvalidArgumentError
from certjax.eval import predict, stats
from certjax.eval.predict import LOWER, PREDICTORS, TURNED, WRONG, of_samples, of_tokens, operating_points
from tests.eval.test_report import record

SCORES = [(1.0, 1.0, 0.1), (1.0, 0.5, 0.4), (0.5, 0.5, 0.2), (0.5, 0.25, 0.3), (0.0, 1.0, 0.9), (1.0, 0.0, 0.5)]
"""Of the baseline, of the other mode, and the other's bound."""


def sample_pairs(rows=SCORES, **where):
    return [
        (record("niah", "dense", i, score=base, **where), record("niah", "naive", i, score=other, bound=bound, **where))
        for i, (base, other, bound) in enumerate(rows)
    ]


def token_pairs(rows, **where):
    """Losses of the baseline, of the other, and bounds, a row of three lists a window."""
    return [
        (record("ppl", "dense", i, token_nll=base, **where),
         record("ppl", "naive", i, token_nll=other, token_bound=bounds, **where))
        for i, (base, other, bounds) in enumerate(rows)
    ]  # fmt: skip


def test_harm_of_a_sample_is_relative_to_the_baseline():
    seen = of_samples(sample_pairs())
    np.testing.assert_allclose(seen.size, [0, 0.5, 0, 0.25, -1, 1])
    assert seen.harms[LOWER][0].tolist() == [False, True, False, True, False, True]
    assert seen.harms[WRONG][0].tolist() == [False, True, True, True, False, True]
    assert seen.harms[TURNED][0][seen.harms[TURNED][1]].tolist() == [False, True, True]  # where the baseline is right
    assert tuple(seen.predictors) == PREDICTORS
    np.testing.assert_allclose(seen.predictors["before_layer_max"], [bound for *_, bound in SCORES])


def test_areas_of_known_samples():
    row = next(r for r in predict.predict(of_samples(sample_pairs())) if r["predictor"] == "before_layer_max")
    # Bounds of those with a lower score .4 .3 .5, of the others .1 .2 .9: 6 of 9 pairs are in order.
    assert row["harms"][LOWER]["auc"]["value"] == pytest.approx(6 / 9)
    assert (row["harms"][LOWER]["harmed"], row["harms"][LOWER]["n"]) == (3, 6)
    assert row["harms"][TURNED]["auc"]["value"] == 1.0  # .4 .5 against .1
    assert (row["harms"][TURNED]["harmed"], row["harms"][TURNED]["n"]) == (2, 3)
    expected = stats.spearman([bound for *_, bound in SCORES], [0, 0.5, 0, 0.25, -1, 1])
    assert row["spearman"] == dataclasses.asdict(expected)


def test_harm_of_a_token_is_a_jump_up_or_down():
    seen = of_tokens(token_pairs([([1, 2, 3], [1.04, 2.1, 2.7], [0.1, 0.2, 0.3]), ([1.0], [1.3], [0.4])]))
    np.testing.assert_allclose(seen.size, [0.04, 0.1, 0.3, 0.3])
    assert seen.harms["> 0.05 nats"][0].tolist() == [False, True, True, True]
    assert seen.harms["> 0.2 nats"][0].tolist() == [False, False, True, True]
    assert seen.clusters.tolist() == [0, 0, 0, 1] and seen.predictors["token_bound"].tolist() == [0.1, 0.2, 0.3, 0.4]


def test_loss_that_is_not_finite_is_a_harm():
    seen = of_tokens(token_pairs([([1.0, 1.0], [float("nan"), 1.0], [float("inf"), 0.1])]))
    (row,) = predict.predict(seen)
    assert row["harms"]["> 0.2 nats"]["harmed"] == 1 and row["harms"]["> 0.2 nats"]["auc"]["value"] == 1.0


def test_tokens_of_a_window_are_one_cluster_and_contexts_are_strata():
    rng = np.random.default_rng(0)

    def windows(n):
        return [(x, x + rng.normal(0, 0.1, 50), b) for x, b in zip(*rng.uniform(size=(2, n, 50)), strict=True)]

    pairs = token_pairs([tuple(map(list, w)) for w in windows(6)], context=2048)
    pairs += token_pairs([tuple(map(list, w)) for w in windows(3)], context=4096)
    seen = of_tokens(pairs)
    (row,) = predict.predict(seen)
    assert row["n"] == 450 and row["clusters"] == 6  # windows of one index may share text
    assert np.unique(seen.strata).size == 2
    harm = row["harms"]["> 0.05 nats"]
    expected = stats.auc(seen.predictors["token_bound"], seen.size > 0.05, clusters=seen.clusters)
    assert harm["auc"] == dataclasses.asdict(expected) != harm["auc_within"]


def test_losses_and_bounds_that_differ_in_number_are_refused():
    with pytest.raises(InvalidArgumentError, match="2 losses as dense, 2 losses and 1 bounds as naive"):
        of_tokens(token_pairs([([1.0, 2.0], [1.0, 2.0], [0.1])]))


def test_operating_points_count_what_a_monitor_would_flag():
    bound, harmed = np.arange(100.0), np.arange(100) >= 80
    points = {p["quantile"]: p for p in operating_points(bound, harmed)}
    assert points[0.75] == {"quantile": 0.75, "threshold": 74, "flagged": 0.25, "caught": 1, "false_alarms": 5 / 80,
                            "harmed_of_flagged": 0.8}  # fmt: skip
    assert points[0.95]["caught"] == 0.25 and points[0.95]["false_alarms"] == 0


def test_operating_points_of_ties_infinities_and_one_kind():
    tied = operating_points(np.ones(10), np.arange(10) > 5)
    assert all(p["flagged"] == 0 == p["caught"] and p["harmed_of_flagged"] is None for p in tied)
    infinite = operating_points(np.array([1, 2, np.nan, np.inf]), np.array([False, False, True, True]))
    assert infinite[0]["threshold"] == 2 and infinite[0]["caught"] == 1 and infinite[-1]["threshold"] == np.inf
    assert all(p["caught"] is None for p in operating_points(np.arange(5.0), np.zeros(5, bool)))
    assert operating_points(np.array([]), np.array([], bool)) == []


def test_no_harm_has_a_reason_and_no_curve():
    for row in predict.predict(of_samples(sample_pairs([(1.0, 1.0, 0.1), (1.0, 1.0, 0.2)])), curves=True):
        for of in row["harms"].values():
            assert of["harmed"] == 0 and of["auc"]["value"] is None and "none of 2" in of["auc"]["reason"]
            assert of["roc"] is None


def test_curve_of_many_tokens_is_thinned_and_keeps_its_ends_and_area():
    rng = np.random.default_rng(0)
    x = rng.uniform(size=5000)
    y = rng.uniform(size=5000) < 0.02 + 0.1 * x
    curve = predict._curve(x, y)
    alarms, caught = map(np.array, (curve["false_alarms"], curve["caught"]))
    assert len(alarms) <= 101 and (alarms[0], caught[0], alarms[-1], caught[-1]) == (0, 0, 1, 1)
    assert np.diff(alarms) @ (caught[1:] + caught[:-1]) / 2 == pytest.approx(stats.auc(x, y).value, abs=0.01)


def test_order_of_samples_plays_no_part():
    rows = [(*row[:2], row[2] + 0.001 * i) for i, row in enumerate(SCORES * 4)]
    pairs = sample_pairs(rows)
    first, again = (predict.predict(of_samples(of)) for of in (pairs, pairs[::-1]))
    for a, b in zip(first, again, strict=True):
        assert a["harms"][LOWER]["auc"] == pytest.approx(b["harms"][LOWER]["auc"])
        assert a["harms"][LOWER]["operating"] == b["harms"][LOWER]["operating"]
