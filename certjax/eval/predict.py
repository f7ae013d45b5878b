"""Does the certificate know? Bounds that were known while decoding, against the harm seen afterwards.

A harm is measured on pairs of the baseline's record and another mode's of the same sample. The predictors are *before*
bounds: of the quantized attempt, before heads went dense. In a mode without fallback they speak of what was returned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from certjax.errors import InvalidArgumentError
from certjax.eval import stats
from certjax.eval.records import Record

Pair = tuple[Record, Record]

PREDICTORS = ("before_layer_max", "before_layer_mean", "before_max", "before_mean", "before_paper_mean")
"""Of a sample. The first is the one to read, named before any data: picking the best area would flatter it."""

LOWER, WRONG, TURNED = "lower score", "wrong", "right turned wrong"
"""Harms of a sample: it scores below the baseline; not all references found; the same where the baseline found all."""

JUMPS = (0.05, 0.2)
"""Harm of a token: its loss differs from the baseline's by more than so many nats, up or down."""

QUANTILES = (0.5, 0.75, 0.9, 0.95, 0.99)
_CURVE = 101  # at most so many corners of a curve are kept


@dataclasses.dataclass(frozen=True)
class Observations:
    """What can be predicted, and from what; arrays of n samples or tokens.

    Attributes
    ----------
    predictors
        Bounds by name.
    size
        How much was lost: score, or nats in absolute value.
    harms
        By name: who was harmed, and which of the n count.
    clusters
        Label of what is independent of the rest: the sample or window.
    strata
        Label of task and context.
    """

    predictors: dict[str, np.ndarray]
    size: np.ndarray
    harms: dict[str, tuple[np.ndarray, np.ndarray]]
    clusters: np.ndarray
    strata: np.ndarray


def right(record: Record) -> bool:
    """All references found."""
    return record.score == 1


def of_samples(pairs: Sequence[Pair]) -> Observations:
    """One observation a sample of a benchmark with scores."""
    everyone = np.ones(len(pairs), bool)
    wrong = np.array([not right(other) for _, other in pairs])
    size = np.array([base.score - other.score for base, other in pairs])
    clusters, strata = _labels(pairs)
    return Observations(
        {name: np.array([getattr(other.certificate, name) for _, other in pairs], float) for name in PREDICTORS},
        size,
        {
            LOWER: (size > 0, everyone),
            WRONG: (wrong, everyone),
            TURNED: (wrong, np.array([right(base) for base, _ in pairs])),
        },
        clusters,
        strata,
    )


def of_tokens(pairs: Sequence[Pair]) -> Observations:
    """One observation a scored token of "ppl".

    Raises
    ------
    InvalidArgumentError
        If losses and bounds of a window differ in number.
    """
    for base, other in pairs:
        if not len(base.token_nll) == len(other.token_nll) == len(other.token_bound):
            raise InvalidArgumentError(
                f"window {other.task}/{other.context}/{other.sample} has {len(base.token_nll)} losses as {base.mode}, "
                f"{len(other.token_nll)} losses and {len(other.token_bound)} bounds as {other.mode}; run both again."
            )
    size = np.abs(np.concatenate([np.subtract(other.token_nll, base.token_nll) for base, other in pairs]))
    lengths = [len(other.token_nll) for _, other in pairs]
    clusters, strata = (np.repeat(labels, lengths) for labels in _labels(pairs))
    return Observations(
        {"token_bound": np.concatenate([np.array(other.token_bound, float) for _, other in pairs])},
        size,
        {f"> {jump} nats": (~(size <= jump), np.ones(size.size, bool)) for jump in JUMPS},
        clusters,
        strata,
    )


def _labels(pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
    """Samples of one index at several contexts may share their text: they are one cluster."""
    clusters, strata = {}, {}
    of = [
        (
            clusters.setdefault((other.task, other.sample, other.seed), len(clusters)),
            strata.setdefault((other.task, other.context), len(strata)),
        )
        for _, other in pairs
    ]
    return tuple(np.array(of).T)


def predict(seen: Observations, *, curves: bool = False) -> list[dict[str, Any]]:
    """How each predictor relates to each harm. Plain types.

    A predictor's row has `n`, `clusters`, `spearman` with the size of the harm, and a row a harm in `harms`: how many
    count and were harmed, `auc`, `auc_within` (compared within task and context only), `operating`, and with `curves`
    corners of the ROC curve.
    """
    rows = []
    for name, bound in seen.predictors.items():
        harms = {}
        for harm, (harmed, counted) in seen.harms.items():
            x, y, clusters, strata = (of[counted] for of in (bound, harmed, seen.clusters, seen.strata))
            both = y.any() and not y.all()
            harms[harm] = {
                "n": int(y.size),
                "harmed": int(y.sum()),
                "harmed_clusters": int(np.unique(clusters[y]).size),
                "auc": dataclasses.asdict(stats.auc(x, y, clusters=clusters)),
                "auc_within": dataclasses.asdict(stats.auc(x, y, clusters=clusters, strata=strata)),
                "operating": operating_points(x, y),
                "roc": _curve(x, y) if curves and both else None,
            }
        correlation = stats.spearman(bound, seen.size, clusters=seen.clusters)
        rows.append(
            {
                "predictor": name,
                "n": int(bound.size),
                "clusters": int(np.unique(seen.clusters).size),
                "spearman": dataclasses.asdict(correlation),
                "harms": harms,
            }
        )
    return rows


def operating_points(bound: np.ndarray, harmed: np.ndarray) -> list[dict[str, float | None]]:
    """What a monitor that flags bounds above a threshold would do, with thresholds at quantiles of the bound.

    `flagged` of all, `caught` of the harmed, `false_alarms` of the unharmed, `harmed_of_flagged`; None of nobody.
    """
    if bound.size == 0:
        return []
    bound = np.where(np.isnan(bound), np.inf, bound)
    points = []
    for quantile in QUANTILES:
        threshold = float(np.quantile(bound, quantile, method="inverted_cdf"))
        flagged = bound > threshold
        points.append(
            {
                "quantile": quantile,
                "threshold": threshold,
                "flagged": float(flagged.mean()),
                "caught": _share(flagged[harmed]),
                "false_alarms": _share(flagged[~harmed]),
                "harmed_of_flagged": _share(harmed[flagged]),
            }
        )
    return points


def _share(x: np.ndarray) -> float | None:
    return float(x.mean()) if x.size else None


def _curve(bound: np.ndarray, harmed: np.ndarray) -> dict[str, list[float]]:
    alarms, caught = stats.roc(bound, harmed)
    length = alarms + caught  # along the curve, from 0 to 2
    kept = np.unique(np.searchsorted(length, np.linspace(0, length[-1], _CURVE)))
    return {"false_alarms": alarms[kept].tolist(), "caught": caught[kept].tolist()}
