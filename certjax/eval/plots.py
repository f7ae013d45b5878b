"""Figures of a summary. Needs matplotlib (`certjax[eval]`). Each shows one thing; what is empty is not drawn."""

from __future__ import annotations

import math
import re
import textwrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from certjax.eval.predict import LOWER
from certjax.eval.summary import ALL

_COLORS = ("#444444", "#d1495b", "#2e86ab", "#3c9d5a", "#e09f3e", "#7b5ea7", "#8c6d46", "#5fb3b3")
_RUNGS = ("0: as stored", "1: original keys", "2: original values", "3: head dense", "4: layer dense")
_RUNG_COLORS = ("#d9e2ec", "#9fc5e8", "#4a90c2", "#f0a04b", "#c0392b")
_BENCHMARKS = {"ppl": "perplexity", "niah": "needles", "ruler": "RULER"}


def draw(report: dict[str, Any], audits: list[dict[str, Any]] = ()) -> dict[str, Figure]:
    """Name of a PNG file to figure, in the order of the report. `audits`: what `certjax audit --json` printed."""
    figures = {
        "ppl_delta.png": _losses(report),
        "niah_share_right.png": _scores(report, "niah", "pass_rate", "share of samples with every needle found"),
        "ruler_score.png": _scores(report, "ruler", "score", "mean share of references found"),
        "rungs.png": _rungs(report),
        "bytes.png": _bytes(report),
        **{f"heads_{slug(mode)}.png": _heads(mode, of) for mode, of in report["heads"].items()},
        **{f"roc_{of}.png": _rocs(report, of) for of in _BENCHMARKS},
    }
    for i, audit in enumerate(audits):
        figures[f"bound_vs_error_{i}_{slug(audit['report']['policy']['codec'])}.png"] = _bounds(audit)
    return {name: figure for name, figure in figures.items() if figure is not None}


def slug(label: str) -> str:
    """A mode's label as part of a file name."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", label)


# -- quality ------------------------------------------------------------------------------------------


def _losses(report: dict[str, Any]) -> Figure | None:
    rows = [r for r in _overall(report["ppl"]) if r.get("delta_nll") and r["delta_nll"]["value"] is not None]
    if not rows:
        return None
    figure, axis = _by_context(report, rows, "delta_nll")
    ends = [[r["delta_nll"][of] or 0 for of in ("value", "low", "high")] for r in rows]
    sizes = [max(map(abs, of)) for of in ends if any(of)]
    if sizes and max(sizes) > 20 * min(sizes):  # a mode that fails must not hide the others
        axis.set_yscale("symlog", linthresh=2 * min(sizes))
        axis.set_ylim(2 * min(-min(sizes), *map(min, ends)), 2 * max(min(sizes), *map(max, ends)))
    axis.axhline(0, color=_COLORS[0], linewidth=1)
    axis.set(ylabel="nats a token", title=f"Loss added to {report['baseline']}, mean over windows with 95% interval")
    return figure


def _scores(report: dict[str, Any], benchmark: str, of: str, label: str) -> Figure | None:
    rows = [r for r in _overall(report[benchmark]) if r[of]["value"] is not None]
    if not rows:
        return None
    figure, axis = _by_context(report, rows, of)
    axis.set(ylabel=label, ylim=(-0.03, 1.03), title=f"{_BENCHMARKS[benchmark]}: quality by mode, with 95% interval")
    return figure


def _overall(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    several = any(r["task"] == ALL for r in rows)
    return [r for r in rows if r["task"] == ALL or not several]


def _by_context(report: dict[str, Any], rows: list[dict[str, Any]], of: str) -> tuple[Figure, Axes]:
    """Estimates with their intervals, modes side by side at each context."""
    contexts = sorted({r["context"] for r in rows})
    modes = [mode for mode in report["modes"] if any(r["mode"] == mode for r in rows)]
    figure = Figure(figsize=(max(6, 2 + 1.6 * len(contexts)), 4.2), layout="constrained")
    axis = figure.subplots()
    for i, mode in enumerate(modes):
        own = [r for r in rows if r["mode"] == mode]
        x = [contexts.index(r["context"]) + 0.6 * ((i + 0.5) / len(modes) - 0.5) for r in own]
        y, low, high = (np.array([r[of][end] for r in own], float) for end in ("value", "low", "high"))
        spread = np.nan_to_num(np.maximum([y - low, high - y], 0))
        color = _color(report, mode)
        at = {r["context"] for r in own}
        tasks, most = (max(r["tasks"] for r in of if r["context"] in at) for of in (own, rows))
        label = mode if tasks == most else f"{mode} ({tasks} of {most} tasks)"
        axis.errorbar(x, y, spread, fmt="o", color=color, capsize=3, label=label)
    axis.set_xticks(range(len(contexts)), [f"{context:,}" for context in contexts])
    axis.set(xlabel="context, tokens", xlim=(-0.5, len(contexts) - 0.5))
    axis.grid(axis="y", alpha=0.3)
    columns = max(1, min(len(modes), 70 // (8 + max(map(len, modes)))))
    figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    return figure, axis


def _color(report: dict[str, Any], mode: str) -> str:
    return _COLORS[list(report["modes"]).index(mode) % len(_COLORS)]


# -- certificates -------------------------------------------------------------------------------------


def _rungs(report: dict[str, Any]) -> Figure | None:
    rows = report["cost"]
    if not rows:
        return None
    figure, axis = _bars(rows)
    left = np.zeros(len(rows))
    for rung, (name, color) in enumerate(zip(_RUNGS, _RUNG_COLORS, strict=True)):
        width = np.array([r["rungs"][rung] for r in rows])
        axis.barh(range(len(rows)), width, left=left, color=color, label=name)
        left += width
    for y, r in enumerate(rows):
        dense = r["rungs"][3] + r["rungs"][4]
        axis.text(1.01, y, f"{dense:.2%} dense", va="center", fontsize="small")
    axis.set(xlabel="share of head-steps", xlim=(0, 1), title="Rung on which head-steps ended")
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _bytes(report: dict[str, Any]) -> Figure | None:
    rows = report["cost"]
    if not rows:
        return None
    figure, axis = _bars(rows)
    device, host = (np.array([r[f"{of}_over_dense"] for r in rows]) for of in ("device", "host"))
    axis.barh(range(len(rows)), device, color="#4a90c2", label="from the device")
    axis.barh(range(len(rows)), host, left=device, color="#f0a04b", label="from the host")
    for y, total in enumerate(device + host):
        axis.text(total, y, f" {total:.2f}", va="center", fontsize="small")
    axis.axvline(1, color=_COLORS[0], linewidth=1, linestyle="--")
    axis.set(xlabel="bytes read over those of dense attention (dashed)", title="Bytes read a step")
    axis.set_xlim(0, 1.12 * max(1, *(device + host)))
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _bars(rows: list[dict[str, Any]]) -> tuple[Figure, Axes]:
    labels = [f"{_BENCHMARKS[r['benchmark']]}, {r['context']:,}, {r['mode']}" for r in rows]
    figure = Figure(figsize=(6.5 + 0.075 * max(map(len, labels)), 2 + 0.27 * len(rows)), layout="constrained")
    axis = figure.subplots()
    axis.set_yticks(range(len(rows)), labels, fontsize="small")
    axis.set_ylim(len(rows) - 0.4, -0.6)
    return figure, axis


def _heads(mode: str, benchmarks: dict[str, Any]) -> Figure:
    """Bound, share of steps dense and blocks promoted, of every head; a row a benchmark."""
    panels = (("bound", "mean bound, share of the layer's norm"), ("dense", "steps that went dense"),
              ("promoted", "blocks promoted a step"))  # fmt: skip
    maps = {name: [_array(of[name], math.inf) for of in benchmarks.values()] for name, _ in panels}
    n_layers, n_heads = maps["bound"][0].shape
    size = (3 * min(2.2 + 0.12 * n_heads, 6), 0.9 + len(benchmarks) * min(1.4 + 0.1 * n_layers, 6))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(f"Which heads escalate\n{mode}")
    grid = figure.subplots(len(benchmarks), 3, sharex=True, sharey=True, squeeze=False)
    for column, (name, title) in zip(grid.T, panels, strict=True):
        norm = _norm(name, np.concatenate(maps[name], axis=None))
        for axis, x, benchmark in zip(column, maps[name], benchmarks, strict=True):
            x = np.minimum(x, norm.vmax)
            image = axis.imshow(x, norm=norm, cmap="viridis", aspect="auto", interpolation="nearest")
            for side in (axis.xaxis, axis.yaxis):
                side.set_major_locator(MaxNLocator(integer=True))
            if name == "bound":
                axis.set_ylabel(f"{_BENCHMARKS[benchmark]}\nlayer")
        column[0].set_title(title, fontsize="medium")
        column[-1].set_xlabel("head")
        figure.colorbar(image, ax=column.tolist(), format=PercentFormatter(1) if name == "dense" else None)
    return figure


def _array(rows: list[list[float | None]], none: float) -> np.ndarray:
    return np.array([[none if x is None else x for x in row] for row in rows], float)


def _norm(name: str, x: np.ndarray) -> Normalize:
    """Bounds on a logarithmic scale, down to a thousandth of the largest; the others from 0."""
    top = x[np.isfinite(x)].max(initial=0.0)
    if name == "bound" and top > 0:
        return LogNorm(max(x[x > 0].min(), top / 1000) * 0.999, top, clip=True)
    return Normalize(0, top or 1)


# -- prediction ---------------------------------------------------------------------------------------


def _rocs(report: dict[str, Any], benchmark: str) -> Figure | None:
    """All contexts together: a panel a mode with a curve a bound; of tokens, a panel a harm with a curve a mode."""
    panels: dict[str, list] = {}
    for r in report["knows"]:
        if r["benchmark"] == benchmark and r["context"] == ALL:
            for harm, of in r["harms"].items():
                if of["roc"] and benchmark == "ppl":
                    panels.setdefault(f"loss differs by {harm}", []).append((r["mode"], _color(report, r["mode"]), of))
                elif of["roc"] and harm == LOWER:
                    curves = panels.setdefault(f"{_wrapped(r['mode'])}\n{of['harmed']} of {of['n']} samples harmed", [])
                    curves.append((r["predictor"], _COLORS[len(curves) % len(_COLORS)], of))
    if not panels:
        return None
    columns = min(len(panels), 3)
    n_rows = -(-len(panels) // columns)
    lines = max(map(len, panels.values()))
    figure = Figure(figsize=(max(4.2 * columns, 6), 0.6 + (4.8 + 0.25 * lines) * n_rows), layout="constrained")
    what = "tokens whose loss jumps" if benchmark == "ppl" else "samples that lose score"
    figure.suptitle(f"{_BENCHMARKS[benchmark]}: does the bound pick out {what}?")
    axes = figure.subplots(n_rows, columns, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, (title, curves) in zip(axes, panels.items(), strict=False):
        for label, color, of in curves:
            axis.plot(of["roc"]["false_alarms"], of["roc"]["caught"], color=color, label=_label(label, of["auc"]))
        axis.plot([0, 1], [0, 1], color="#aaaaaa", linestyle=":", linewidth=1)
        axis.set(title=title, xlabel="share of unharmed flagged", ylabel="share of harmed caught",
                 xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")  # fmt: skip
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    return figure


def _label(name: str, auc: dict[str, Any]) -> str:
    between = "" if auc["low"] is None else f" [{auc['low']:.2f}, {auc['high']:.2f}]"
    return _wrapped(f"{name}: area {auc['value']:.2f}{between}")


def _wrapped(text: str) -> str:
    """Lines that fit a panel; a mode's options are joined by commas without spaces."""
    return textwrap.fill(text.replace(",", ", ").replace(",  ", ", "), 46)


def _bounds(audit: dict[str, Any]) -> Figure:
    """A point a head: the largest certified error against the largest true one, over the positions of the audit."""
    of = audit["report"]
    tolerance, heads = of["policy"]["tolerance"], of["heads"]
    true, bound = (_array(heads[name], math.nan) for name in ("true_max", "certified_max"))
    layer = np.broadcast_to(np.arange(true.shape[0])[:, None], true.shape)
    drawn = (true > 0) & (bound > 0) & np.isfinite(bound)
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    axis = figure.subplots()
    points = axis.scatter(true[drawn], bound[drawn], c=layer[drawn], s=18, vmin=0, vmax=max(1, true.shape[0] - 1))
    axis.axline((tolerance, tolerance), slope=1, color=_COLORS[0], linewidth=1, label="bound = true error")
    for line in (axis.axhline, axis.axvline):
        line(tolerance, color=_COLORS[1], linewidth=1, linestyle="--")
    axis.plot([], [], color=_COLORS[1], linestyle="--", label=f"tolerance, {tolerance:.3g}")
    axis.set(xscale="log", yscale="log", xlabel="largest true error of a head, share of the layer's norm",
             ylabel="largest certified bound, share of the layer's norm",
             title=f"{of['policy']['codec']} on {audit['text']}: {drawn.sum()} of {true.size} heads, a point each")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    figure.colorbar(points, label="layer").ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure
