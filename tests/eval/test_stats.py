"""Estimates and intervals against SciPy, statsmodels and scikit-learn, by definition, and on data that degenerate.

Numbers marked with a library were computed with it (statsmodels 0.15.0, scikit-learn 1.9.1, SciPy 1.18.1).
"""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from certjax.eval.stats import _newcombe, auc, bootstrap_mean, mcnemar, roc, share, spearman, t_interval

X = [0.31, -0.12, 0.05, 0.44, -0.27, 0.18, 0.09, 0.02]
PREDICTOR = [0.2, 0.5, 0.5, 0.1, 0.9, 0.7, 0.5, 0.3, 0.8, 0.4]
HARMED = [0, 1, 0, 0, 1, 0, 1, 0, 1, 0]

values = arrays(np.float64, st.integers(2, 30), elements=st.floats(-100, 100).map(lambda x: round(x, 2)))
labelled = st.lists(st.tuples(st.integers(-5, 5), st.booleans(), st.integers(0, 6)), min_size=2, max_size=30)
outcomes = st.lists(st.tuples(st.booleans(), st.booleans()), max_size=30)


def interval(estimate):
    return estimate.low, estimate.high


def pairs(critical, reverse, concordant=3):
    """Outcomes of the baseline and the other."""
    both = [(True, False)] * critical + [(False, True)] * reverse + [(True, True), (False, False)] * concordant
    return tuple(np.array(both).reshape(-1, 2).T)


# -- means --------------------------------------------------------------------------------------------


def test_t_interval_is_that_of_statsmodels():
    found = t_interval(X)
    assert found.value == pytest.approx(0.0875, abs=1e-15)
    assert interval(found) == pytest.approx((-0.10186776840345836, 0.27686776840345834), rel=1e-12)  # DescrStatsW


@given(values, values)
def test_t_interval_of_differences_is_that_of_the_paired_t_test(a, b):
    n = min(a.size, b.size)
    x = a[:n] - b[:n]
    if np.ptp(x) < 1e-9:
        return
    expected = scipy.stats.ttest_rel(a[:n], b[:n]).confidence_interval()
    assert interval(t_interval(x)) == pytest.approx(tuple(expected), rel=1e-9, abs=1e-9)


@given(values)
def test_t_interval_is_that_of_statsmodels_on_random_data(x):
    weights = pytest.importorskip("statsmodels.stats.weightstats")
    if np.ptp(x) > 1e-9:
        expected = weights.DescrStatsW(x).tconfint_mean()
        assert interval(t_interval(x)) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(values, st.randoms())
def test_means_turn_with_the_sign_and_do_not_depend_on_the_order(x, random):
    shuffled = random.sample(x.tolist(), x.size)
    for estimate in (t_interval, lambda x: bootstrap_mean([x], resamples=200)):
        found = estimate(x)
        assert found.low <= found.value + 1e-9 and found.value <= found.high + 1e-9
        assert interval(estimate(shuffled)) == pytest.approx(interval(found), abs=1e-9)
    turned = t_interval(-x)
    assert (-turned.high, -turned.low) == pytest.approx(interval(t_interval(x)), abs=1e-9)


def test_t_interval_covers_the_mean_95_times_in_100():
    draws = np.random.default_rng(5).normal(1.0, 2.0, (2000, 6))
    covered = [e.low <= 1.0 <= e.high for e in map(t_interval, draws)]
    assert 0.935 < np.mean(covered) < 0.965  # three standard deviations


def test_bootstrap_is_that_of_scipy():
    x = np.random.default_rng(0).gamma(2, 1, 40)
    rng = np.random.default_rng(1)
    expected = scipy.stats.bootstrap((x,), np.mean, method="percentile", n_resamples=20_000, rng=rng)
    found = bootstrap_mean([x], resamples=20_000)
    assert interval(found) == pytest.approx(tuple(expected.confidence_interval), abs=0.02 * np.ptp(interval(found)))
    assert found.value == pytest.approx(x.mean()) and found.n == 40


def test_bootstrap_of_groups_weighs_groups_alike_and_resamples_within_them():
    rng = np.random.default_rng(0)
    few, many = rng.normal(0, 1, 10), rng.normal(5, 1, 1000)
    found = bootstrap_mean([few, many])
    assert found.value == pytest.approx((few.mean() + many.mean()) / 2)
    error = np.sqrt(few.var() / 10 + many.var() / 1000) / 2
    assert interval(found) == pytest.approx((found.value - 1.96 * error, found.value + 1.96 * error), abs=0.2 * error)


def test_bootstrap_repeats_with_its_seed_and_only_then():
    first, again, other = (bootstrap_mean([X], seed=seed) for seed in (1, 1, 2))
    assert first == again and first != other


def test_bootstrap_in_chunks_covers_all_resamples():
    x = np.random.default_rng(0).normal(size=3000)  # 666 resamples a chunk
    found = bootstrap_mean([x], resamples=2000)
    assert interval(found) == pytest.approx((x.mean() - 1.96 / 3000**0.5, x.mean() + 1.96 / 3000**0.5), abs=0.005)


@pytest.mark.parametrize("estimate", [t_interval, lambda x: bootstrap_mean([x])], ids=["t", "bootstrap"])
def test_means_without_spread_or_values_say_so(estimate):
    assert interval(estimate([0.0] * 5)) == (0.0, 0.0) and "no spread" in estimate([0.0] * 5).reason
    assert interval(estimate([0.1] * 7)) == pytest.approx((0.1, 0.1))
    one = estimate([2.0])
    assert one.value == 2.0 and interval(one) == (None, None) and "no spread" in one.reason
    assert estimate([]).value is None and estimate([]).reason == "no values"
    broken = estimate([1.0, np.nan, np.inf])
    assert broken.value is None and broken.reason == "2 of 3 values are not finite"


# -- counts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("critical", "reverse", "p"), [(9, 2, 0.0654296875), (0, 5, 0.0625), (7, 7, 1.0), (1, 0, 1.0), (0, 0, 1.0)]
)
def test_mcnemar_is_that_of_statsmodels(critical, reverse, p):
    found = mcnemar(*pairs(critical, reverse))
    assert (found.critical, found.reverse, found.n) == (critical, reverse, critical + reverse + 6)
    assert found.p == pytest.approx(p, rel=1e-12)


@given(outcomes)
def test_mcnemar_is_that_of_statsmodels_on_random_data_and_symmetric(both):
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    a, b = np.array(both, bool).reshape(-1, 2).T
    found, turned = mcnemar(a, b), mcnemar(b, a)
    assert (found.critical, found.reverse, found.p) == (turned.reverse, turned.critical, turned.p)
    if found.critical + found.reverse:
        table = [[(a & b).sum(), found.critical], [found.reverse, (~a & ~b).sum()]]
        assert found.p == pytest.approx(tables.mcnemar(table, exact=True).pvalue, rel=1e-9)
    else:
        assert found.p == 1.0


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (0, 20, 0, 0.16843347098308534),
        (3, 40, 0.01574217985104153, 0.20386474873289898),
        (20, 20, 0.8315665290169146, 1),
    ],
)
def test_share_has_the_interval_of_clopper_and_pearson(k, n, low, high):
    found = share(k, n)  # expected: statsmodels' proportion_confint, method "beta"
    assert (found.value, found.n) == (k / n, n) and interval(found) == pytest.approx((low, high), rel=1e-9)
    assert share(0, 0).value is None and share(0, 0).reason


# -- prediction ---------------------------------------------------------------------------------------


def delong(x, y, clusters):
    """Area and its standard error, pair by pair: DeLong's components, summed over clusters as Obuchowski has it."""
    x, y, clusters = (np.asarray(of) for of in (x, y.astype(bool), clusters))
    wins = np.array([[1.0 if a > b else 0.5 if a == b else 0.0 for b in x[~y]] for a in x[y]])
    area, m, n = wins.mean(), y.sum(), (~y).sum()
    bad, good = wins.mean(1) - area, wins.mean(0) - area
    labels = np.unique(clusters)
    a = np.array([bad[clusters[y] == c].sum() for c in labels])
    b = np.array([good[clusters[~y] == c].sum() for c in labels])
    i10, i01, i = np.isin(labels, clusters[y]).sum(), np.isin(labels, clusters[~y]).sum(), labels.size
    s10, s01 = i10 / ((i10 - 1) * m) * (a @ a), i01 / ((i01 - 1) * n) * (b @ b)
    s11 = i / (i - 1) * (a @ b)
    return area, np.sqrt(s10 / m + s01 / n + 2 * s11 / (m * n))


def test_auc_is_that_of_scikit_learn():
    assert auc(PREDICTOR, HARMED).value == pytest.approx(0.875, abs=1e-15)  # roc_auc_score


@given(labelled)
def test_auc_is_that_of_scikit_learn_on_random_data_and_half_turned_around(rows):
    metrics = pytest.importorskip("sklearn.metrics")
    x, y, _ = np.array(rows, float).T
    found = auc(x, y)
    if y.all() or not y.any():
        assert found.value is None
        return
    assert found.value == pytest.approx(metrics.roc_auc_score(y, x), abs=1e-12)
    turned = auc(-x, y)
    assert turned.value == pytest.approx(1 - found.value, abs=1e-12)
    if found.low is not None:
        assert found.low - 1e-9 <= found.value <= found.high + 1e-9
        assert (1 - turned.high, 1 - turned.low) == pytest.approx(interval(found), abs=1e-6)


@pytest.mark.parametrize("size", [1, 8], ids=["samples", "clusters"])
def test_interval_of_the_area_is_delongs_in_log_odds(size):
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(96 // size), size)
    common = rng.normal(size=96)[clusters]
    x = np.round(common + rng.normal(size=96), 1)
    y = common + rng.normal(size=96) > 0.5
    area, error = delong(x, y, clusters)
    odds, half = np.log(area / (1 - area)), 1.959963984540054 * error / (area * (1 - area))
    expected = 1 / (1 + np.exp(-(odds - half))), 1 / (1 + np.exp(-(odds + half)))
    found = auc(x, y, clusters=clusters)
    assert found.value == pytest.approx(area) and interval(found) == pytest.approx(expected)


@given(labelled, st.randoms())
@settings(max_examples=50)
def test_prediction_does_not_depend_on_order_labels_or_scale(rows, random):
    def estimates(rows, scale=1.0, shift=0):
        x, y, c = np.array(rows, float).T
        names = np.array([f"window {10 + shift + int(i)}" for i in c])
        scaled = scale * x
        return auc(scaled, y, clusters=names), auc(scaled, y, strata=names), spearman(scaled, x * y, clusters=names)

    for a, b in zip(estimates(rows), estimates(random.sample(rows, len(rows)), 3.0, 50), strict=True):
        assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high), abs=1e-9) and a.reason == b.reason


def test_interval_of_the_area_covers_over_clusters():
    rng = np.random.default_rng(3)

    def draw(n_clusters):
        c = np.repeat(np.arange(n_clusters), 50)
        hard, loud, noise = rng.normal(size=n_clusters)[c], rng.normal(size=n_clusters)[c], rng.normal(size=(3, c.size))
        return noise[0] + 0.7 * loud + noise[1] + 0.5 * hard, hard + noise[0] + noise[2] > 1.5, c

    x, y, _ = draw(6_000)
    truth = auc(x, y).value
    draws = [draw(25) for _ in range(300)]
    found, independent = [auc(x, y, clusters=c) for x, y, c in draws], [auc(x, y) for x, y, _ in draws]
    assert 0.91 < np.mean([e.low <= truth <= e.high for e in found]) < 0.99
    assert np.mean([e.low <= truth <= e.high for e in independent]) < 0.9  # tokens of a window are not independent


def test_area_within_strata_does_not_reward_knowing_the_stratum():
    """A task that is always hard has large bounds and many failures; within a task the bound says nothing."""
    rng = np.random.default_rng(0)
    hard = np.repeat([0, 1], 400)
    x, y = hard + rng.uniform(size=800), rng.uniform(size=800) < np.where(hard, 0.6, 0.05)
    whole, within = auc(x, y), auc(x, y, strata=hard)
    assert whole.low > 0.7 and within.low < 0.5 < within.high
    parts = [auc(x[hard == s], y[hard == s]).value for s in (0, 1)]
    assert within.value == pytest.approx(np.average(parts, weights=[y[hard == s].sum() for s in (0, 1)]))


def test_strata_of_one_kind_are_left_out():
    x, y, strata = [1, 2, 3, 4, 9, 9], [0, 1, 0, 1, 0, 0], ["a", "a", "a", "a", "b", "b"]
    assert auc(x, y, strata=strata) == auc(x[:4], y[:4])
    nothing = auc([1, 2], [0, 1], strata=["a", "b"])
    assert nothing.value is None and "no stratum" in nothing.reason


@pytest.mark.parametrize(("harmed", "said"), [([0, 0, 0], "none of 3"), ([1, 1, 1], "all of 3")])
def test_area_without_both_kinds_says_why(harmed, said):
    found = auc([1, 2, 3], harmed)
    assert found.value is None and interval(found) == (None, None) and said in found.reason


def test_perfect_separation_has_an_interval_that_narrows_with_the_samples():
    few, many = auc([1, 2, 3, 4, 5], [0, 0, 0, 1, 1]), auc(np.arange(100), np.arange(100) > 60)
    assert few.value == many.value == few.high == many.high == 1.0
    assert 0.3 < few.low < 0.6 < 0.9 < many.low < 1
    clustered = auc(np.arange(100), np.arange(100) > 60, clusters=np.arange(100) // 10)
    assert clustered.low < many.low
    assert interval(auc(-np.arange(100), np.arange(100) > 60)) == pytest.approx((0, 1 - many.low), abs=1e-9)


def test_newcombes_limits_solve_his_equation():
    low, high = _newcombe(0.8, 12, 30)
    for t in (low, high):
        k = 20  # (12 + 30) / 2 - 1
        variance = t * (1 - t) * (1 + k * (1 - t) / (2 - t) + k * t / (1 + t)) / 360
        assert abs(t - 0.8) == pytest.approx(1.959963984540054 * np.sqrt(variance))
    assert low < 0.8 < high


def test_one_harmed_sample_and_equal_or_infinite_predictors():
    lone = auc(np.arange(50), np.arange(50) == 40)
    assert lone.value == pytest.approx(40 / 49) and lone.low < 0.5 and lone.high > 0.9
    equal = auc([np.inf] * 4, [0, 1, 0, 1])
    assert equal.value == 0.5 and equal.low is None and "equal" in equal.reason
    assert auc([1, np.nan, 2, np.inf], [0, 1, 0, 1]).value == 1.0


@given(labelled)
def test_roc_is_monotone_and_has_the_area(rows):
    x, y, _ = np.array(rows, float).T
    if y.all() or not y.any():
        return
    alarms, caught = roc(x, y)
    assert (alarms[0], caught[0], alarms[-1], caught[-1]) == (0, 0, 1, 1)
    assert (np.diff(alarms) >= 0).all() and (np.diff(caught) >= 0).all()
    assert np.diff(alarms) @ (caught[1:] + caught[:-1]) / 2 == pytest.approx(auc(x, y).value)


def test_spearman_is_that_of_scipy():
    assert spearman(PREDICTOR, HARMED).value == pytest.approx(0.6474987709525735)  # spearmanr
    rng = np.random.default_rng(0)
    x, y = np.round(rng.normal(size=(2, 60)), 1)
    found = spearman(x, x + y)
    assert found.value == pytest.approx(scipy.stats.spearmanr(x, x + y).statistic)
    assert found.low < found.value < found.high


def test_interval_of_spearman_covers_over_clusters():
    rng = np.random.default_rng(1)

    def draw(n_clusters):
        c = np.repeat(np.arange(n_clusters), 20)
        return *(rng.normal(size=(2, n_clusters))[:, c] + rng.normal(size=c.size) + rng.normal(size=(2, c.size))), c

    truth = 6 / np.pi * np.arcsin(1 / 3 / 2)  # of normals with correlation 1/3
    found = [spearman(x, y, clusters=c) for x, y, c in (draw(20) for _ in range(300))]
    assert 0.91 < np.mean([e.low <= truth <= e.high for e in found]) < 0.99


def test_spearman_of_what_is_constant_perfect_or_in_few_clusters():
    assert spearman([1, 1, 1], [1, 2, 3]).value is None
    perfect = spearman([1, 2, 3, 4], [10, 20, np.nan, np.inf])
    assert perfect.value == pytest.approx(0.9486832980505138)  # NaN ties with infinity
    assert spearman([1, 2, 3], [1, 2, 3]).value == 1.0 and spearman([1, 2, 3], [1, 2, 3]).low is None
    assert spearman(PREDICTOR, HARMED, clusters=[0] * 5 + [1] * 5).low is None
