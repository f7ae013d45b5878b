"""Estimates with their intervals, on NumPy arrays. Needs SciPy (`certjax[eval]`). Intervals are two-sided, 95%.

No p-value and no interval is corrected for the number of comparisons: the claim that two modes do not differ would
only become easier to make.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special, stats

LEVEL = 0.95
RESAMPLES = 10_000
_Z = float(special.ndtri((1 + LEVEL) / 2))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number and its interval.

    Attributes
    ----------
    value, low, high
        None where there is none; `reason` says why.
    n
        Observations it rests on.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class McNemar:
    """Paired outcomes of a baseline and another mode.

    Attributes
    ----------
    n
        Pairs.
    critical
        Critical failures: the baseline right, the other wrong.
    reverse
        The baseline wrong, the other right.
    p
        Of as uneven a split of the `critical + reverse` discordant pairs, if both were equally likely; 1 without any.
    """

    n: int
    critical: int
    reverse: int
    p: float


# -- means --------------------------------------------------------------------------------------------


def t_interval(x: ArrayLike) -> Estimate:
    """Mean of `x` (a paired delta: pass differences) with Student's interval."""
    x = np.asarray(x, np.float64)
    if (reason := _no_mean(x)) is not None:
        return Estimate(None, None, None, x.size, reason)
    if x.size == 1:
        return Estimate(float(x[0]), None, None, 1, "one value has no spread")
    if np.ptp(x) == 0:
        return Estimate(float(x[0]), float(x[0]), float(x[0]), x.size, _equal(x))
    mean = float(x.mean())
    half = float(stats.t.ppf((1 + LEVEL) / 2, x.size - 1) * x.std(ddof=1) / np.sqrt(x.size))
    return Estimate(mean, mean - half, mean + half, x.size)


def bootstrap_mean(groups: Sequence[ArrayLike], *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Mean over groups of each group's mean, with the percentile interval of a bootstrap within groups.

    Groups are strata that are not resampled, such as a benchmark's tasks; pass differences for a paired delta. The
    order of a group's values plays no part.
    """
    groups = [np.sort(np.asarray(x, np.float64)) for x in groups if np.size(x)]
    joined = np.concatenate([np.empty(0), *groups])
    if (reason := _no_mean(joined)) is not None:
        return Estimate(None, None, None, joined.size, reason)
    mean = float(np.mean([x.mean() for x in groups]))
    if max(x.size for x in groups) == 1:
        return Estimate(mean, None, None, joined.size, "one value a task has no spread")
    if all(np.ptp(x) == 0 for x in groups):
        return Estimate(mean, mean, mean, joined.size, _equal(joined))
    rng = np.random.default_rng(seed)
    means = np.mean([_resampled_means(x, resamples, rng) for x in groups], axis=0)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(mean, float(low), float(high), joined.size)


def _resampled_means(x: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    rows = max(1, 2_000_000 // x.size)  # 16 MB of indices at a time
    chunks = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    return np.concatenate([x[rng.integers(x.size, size=(chunk, x.size))].mean(1) for chunk in chunks])


def _no_mean(x: np.ndarray) -> str | None:
    if x.size == 0:
        return "no values"
    n = int((~np.isfinite(x)).sum())
    return f"{n} of {x.size} values are not finite" if n else None


def _equal(x: np.ndarray) -> str:
    return f"no spread among {x.size} values"


# -- counts -------------------------------------------------------------------------------------------


def share(k: int, n: int) -> Estimate:
    """k of n, with the exact interval of Clopper and Pearson (1934), which at 0 of n still has a width."""
    if n == 0:
        return Estimate(None, None, None, 0, "none counted")
    interval = stats.binomtest(k, n).proportion_ci(LEVEL, "exact")
    return Estimate(k / n, float(interval.low), float(interval.high), n)


def mcnemar(baseline: ArrayLike, other: ArrayLike) -> McNemar:
    """McNemar's exact test (1947): the binomial test of the discordant pairs, two-sided. Booleans, True is right."""
    baseline, other = np.asarray(baseline, bool), np.asarray(other, bool)
    critical, reverse = int((baseline & ~other).sum()), int((~baseline & other).sum())
    n = critical + reverse
    p = float(stats.binomtest(critical, n).pvalue) if n else 1.0
    return McNemar(baseline.size, critical, reverse, p)


# -- prediction ---------------------------------------------------------------------------------------


def auc(
    predictor: ArrayLike, harmed: ArrayLike, *, clusters: ArrayLike | None = None, strata: ArrayLike | None = None
) -> Estimate:
    """Area under the ROC curve: how often a harmed observation has the larger predictor, ties counting half.

    With strata, a harmed observation is compared with the unharmed of its own stratum only (covariate adjustment; Janes
    and Pepe, Biometrika 96, 2009); strata without both are left out. The interval is symmetric in log odds, by the
    variance of DeLong, DeLong and Clarke-Pearson (Biometrics 44, 1988), summed over clusters as in Obuchowski
    (Biometrics 53, 1997). Where that variance is zero or has no estimate, as when harmed and unharmed separate
    perfectly, it is Newcombe's method 5 (Stat. Med. 25, 2006) with clusters for observations.

    Parameters
    ----------
    predictor : `[n]`; NaN counts as infinite
    harmed : `[n]` bool
    clusters, strata
        `[n]` labels. Default: every observation is its own cluster; one stratum.
    """
    x, y = _no_nan(predictor), np.asarray(harmed, bool)
    cluster = np.arange(x.size) if clusters is None else _codes(clusters)
    stratum = np.zeros(x.size, int) if strata is None else _codes(strata)
    if y.all() or not y.any():
        return Estimate(None, None, None, x.size, f"{'all' if y.any() else 'none'} of {x.size} were harmed")
    both = np.isin(stratum, stratum[y]) & np.isin(stratum, stratum[~y])
    x, y, cluster, stratum = x[both], y[both], cluster[both], stratum[both]
    if x.size == 0:
        return Estimate(None, None, None, 0, "no stratum has both harmed and unharmed")

    away = np.empty(x.size)  # an observation's share in the deviation of the estimate
    placed, m = np.empty(x.size), int(y.sum())
    for s in np.unique(stratum):
        bad, good = (stratum == s) & y, (stratum == s) & ~y
        placed[bad], placed[good] = _above(x[bad], x[good]), 1 - _above(x[good], x[bad])
        away[good] = bad.sum() / m * (placed[good] - placed[bad].mean()) / good.sum()
    area = float(placed[y].mean())
    away[y] = (placed[y] - area) / m

    counts = [np.unique(cluster[of]).size for of in (y, ~y, slice(None))]
    a, b = (np.bincount(cluster[of], away[of], cluster.max() + 1) for of in (y, ~y))
    error = 0.0
    if min(counts) > 1:
        fa, fb, fab = (c / (c - 1) for c in counts)
        error = float(np.sqrt(max(0.0, fa * (a @ a) + fb * (b @ b) + 2 * fab * (a @ b))))
    if error < 1e-9:
        if np.all(x == x[0]):
            return Estimate(area, None, None, x.size, "all predictors are equal")
        return Estimate(area, *_newcombe(area, counts[0], counts[1]), x.size)
    odds, half = special.logit(area), _Z * error / (area * (1 - area))
    return Estimate(area, float(special.expit(odds - half)), float(special.expit(odds + half)), x.size)


def _above(x: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Share of the others that each x exceeds, ties counting half."""
    others = np.sort(others)
    return (np.searchsorted(others, x, "left") + np.searchsorted(others, x, "right")) / (2 * others.size)


def _newcombe(area: float, m: int, n: int) -> tuple[float, float]:
    """Areas t whose distance to `area` is z sqrt(V(t)), V the variance of Hanley and McNeil with (m + n) / 2 each."""
    k = (m + n) / 2 - 1

    def beyond(t, sign):
        variance = t * (1 - t) * (1 + k * (1 - t) / (2 - t) + k * t / (1 + t)) / (m * n)
        return sign * (area - t) - _Z * np.sqrt(variance)

    low = 0.0 if area == 0 else optimize.brentq(beyond, 0, min(area, 1 - 1e-12), args=(1,))
    high = 1.0 if area == 1 else optimize.brentq(beyond, max(area, 1e-12), 1, args=(-1,))
    return float(low), float(high)


def roc(predictor: ArrayLike, harmed: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the ROC curve from (0, 0) to (1, 1): shares of the unharmed and of the harmed at or above a threshold,
    for every threshold. Both kinds must be present."""
    x, y = _no_nan(predictor), np.asarray(harmed, bool)
    order = np.argsort(-x, kind="stable")
    last = np.append(np.flatnonzero(x[order][1:] != x[order][:-1]), x.size - 1)
    alarms, caught = np.cumsum(~y[order])[last], np.cumsum(y[order])[last]
    return np.append(0, alarms) / alarms[-1], np.append(0, caught) / caught[-1]


def spearman(x: ArrayLike, y: ArrayLike, *, clusters: ArrayLike | None = None) -> Estimate:
    """Spearman's rank correlation. Interval: Student's on Fisher's scale, by the jackknife over clusters.

    NaN ranks as infinite. Default: every observation is its own cluster.
    """
    x, y = (_codes(_no_nan(of)) for of in (x, y))
    cluster = np.arange(x.size) if clusters is None else _codes(clusters)
    whole, n = _rank_correlation(x, y), int(cluster.max(initial=-1)) + 1
    if whole is None:
        return Estimate(None, None, None, x.size, "one of the two is constant")
    without = [_rank_correlation(x[cluster != c], y[cluster != c]) for c in range(n)]
    if n < 3 or abs(whole) > 1 - 1e-12 or None in without:
        return Estimate(whole, None, None, x.size, "too few clusters, or a perfect correlation")
    error = np.sqrt((n - 1) / n * np.sum((without - np.mean(without)) ** 2)) / (1 - whole**2)
    half = stats.t.ppf((1 + LEVEL) / 2, n - 1) * error
    low, high = np.tanh(np.arctanh(whole) - half), np.tanh(np.arctanh(whole) + half)
    return Estimate(whole, float(low), float(high), x.size)


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Of codes whose order is that of the values."""
    ranks = []
    for codes in (x, y):
        count = np.bincount(codes)
        ranks.append((np.cumsum(count) - (count - 1) / 2)[codes] - (codes.size + 1) / 2)
    a, b = ranks
    scale = np.sqrt((a @ a) * (b @ b))
    return float(np.clip(a @ b / scale, -1, 1)) if scale > 0 else None


def _no_nan(x: ArrayLike) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return np.where(np.isnan(x), np.inf, x)


def _codes(x: ArrayLike) -> np.ndarray:
    return np.unique(x, return_inverse=True)[1].reshape(-1)
