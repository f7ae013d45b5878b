"""Tables and the Pareto plot of the study: `docs/study.md`, `docs/pareto.png`, from what `benchmarks.study` stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.formats import FORMATS

DOCS = Path(__file__).parents[1] / "docs"
DEFAULT, PAPER = "planes 8+4 / 4+2 (default)", "int8_int4"
FAMILIES = {"planes": "#1b6ca8", "int8": "#d95f02", "fp8": "#7570b3", "KIVI": "#1b9e77"}
LABELS = {
    DEFAULT: ("planes 8+4 / 4+2", (7, 3)), PAPER: ("int8_int4", (7, 3)),
    "planes 8+2 / 4, whole": ("planes 8+2 / 4", (-78, -9)), "planes 8 / 4": ("planes 8 / 4", (7, 3)),
    "planes 8+4 / 4+4": ("planes 8+4 / 4+4", (7, 3)), "planes, not rotated": ("not rotated", (7, 3)),
    "planes, companded 1.25": ("companded", (7, 3)), "int8_int8": ("int8_int8", (7, 3)),
    "fp8_e4m3, a scale a head": ("fp8_e4m3", (7, 3)), "KIVI-like INT4": ("KIVI-like INT4", (-20, -13)),
    "KIVI-like INT2": ("KIVI-like INT2", (-76, -12)), "planes 8+8 / 8+8": ("planes 8+8 / 8+8", (-94, -10)),
}  # fmt: skip
"""Formats that the plot names, and where it puts the name, in points from the mark."""


def write(stored: dict) -> None:
    """`docs/study.md` and `docs/pareto.png`."""
    rows = stored["rows"]
    measured = [name for name in FORMATS if any(r["format"] == name for r in rows)]
    (DOCS / "study.md").write_text(_page(stored["meta"], rows, measured))
    figure = _pareto({name: _mean(rows, name, 0.05, "reported") for name in measured})
    figure.savefig(DOCS / "pareto.png", dpi=130)


def _mean(rows: list[dict], name: str, tolerance: float, split: str, text: str | None = None) -> dict[str, float]:
    """Means over the texts of a set, or one text, of every number of a row."""
    of = [
        r for r in rows
        if (r["format"], r["tolerance"], r["split"]) == (name, tolerance, split) and text in (None, r["text"])
    ]  # fmt: skip
    mean = {k: float(np.mean([r[k] for r in of])) for k, x in of[0].items() if isinstance(x, (int, float))}
    return {**mean, "all_bytes": mean["bytes_read_over_dense"] + mean["bytes_paged_in_over_dense"]}


def _page(meta: dict, rows: list[dict], names: list[str]) -> str:
    steps = sum(r["head_steps"] for r in rows)
    wrong = sum(r["violations"] + r["broken"] for r in rows)
    texts = {split: sorted({f"{r['text']} ({r['kind']})" for r in rows if r["split"] == split})
             for split in ("fit", "reported")}  # fmt: skip
    table = ["| format | bytes held | certified, p50 / p90 | true, p50 / p90 | promoted | dense | bytes read |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name in names:
        m = _mean(rows, name, 0.05, "reported")
        table.append(
            f"| {name} | {m['held']:.1f} ({m['held'] / 256:.2f}x) "
            f"| {m['certified_p50']:.2%} / {m['certified_p90']:.2%} "
            f"| {m['true_p50']:.2%} / {m['true_p90']:.2%} | {m['promoted_blocks_mean']:.2f} | {m['dense_share']:.2%} "
            f"| {m['all_bytes']:.3f}x |"
        )
    sweep = ["| format | tolerance | promoted | dense | bytes read, device + host |", "|---|---|---|---|---|"]
    for name in names:
        tolerances = sorted({r["tolerance"] for r in rows if r["format"] == name})
        for tolerance in tolerances if len(tolerances) > 1 else []:
            m = _mean(rows, name, tolerance, "reported")
            sweep.append(
                f"| {name} | {tolerance:.0%} | {m['promoted_blocks_mean']:.2f} | {m['dense_share']:.2%} | "
                f"{m['bytes_read_over_dense']:.3f} + {m['bytes_paged_in_over_dense']:.3f} = {m['all_bytes']:.3f}x |"
            )
    each = ["| text | certified over int8_int4, p50 / p90 | true over int8_int4, p50 / p90 | promoted over int8_int4 | "
            "bytes read |", "|---|---|---|---|---|"]  # fmt: skip
    for split in ("fit", "reported"):
        for text in sorted({r["text"] for r in rows if r["split"] == split}):
            ours, theirs = (_mean(rows, name, 0.05, split, text) for name in (DEFAULT, PAPER))

            def over(key, a=ours, b=theirs):
                return f"{a[key] / b[key]:.3f}x"

            each.append(
                f"| {text} ({split}) | {over('certified_p50')} / {over('certified_p90')} | {over('true_p50')} / "
                f"{over('true_p90')} | {over('promoted_blocks_mean')} | {ours['all_bytes']:.3f}x |"
            )
    return f"""# The study behind the default format

`python -m benchmarks.study --jobs {meta["jobs"]}` measures, `python -m benchmarks.study --report` writes this page.
{meta["model"]}, {meta["tokens"]:,} tokens a text, {meta["queries"]} positions, all layers and heads.
JAX {meta["jax"]} on a CPU.
{steps:,} head-steps, {wrong} bounds below the error they bound or tolerances broken.

Choices were made on {", ".join(texts["fit"])}.
The tables are of {", ".join(texts["reported"])}.
Errors are shares of the layer's norm, with everything read at its finest and nothing promoted. Promoted blocks are
keys' and values' together, a head, of the 247 behind tier 1. Bytes read count tier 1 at the precisions chosen,
annotations, fingerprints, windows and page-ins, over the bytes of dense attention. Windows are the 16 first and 128
recent tokens where nothing else is said.

![certified error against bytes held](pareto.png)

## Every format, tolerance 5%

{chr(10).join(table)}

## Tolerances

{chr(10).join(sweep)}

## Text by text: the default over the paper's format, tolerance 5%

{chr(10).join(each)}
"""


def _pareto(means: dict[str, dict[str, float]]) -> Figure:
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=False)
    panels = (
        (left, "held", "certified_p90", "bytes a token and KV head in tier 1", "certified error, 90th percentile"),
        (right, "all_bytes", "promoted_blocks_mean", "bytes read at a tolerance of 5%, over dense",
         "blocks promoted a head at 5%"),
    )  # fmt: skip
    for ax, x_key, y_key, x_label, y_label in panels:
        floor = 0.02 if y_key == "promoted_blocks_mean" else 0.0  # a logarithmic axis has no place for none at all
        for name, m in means.items():
            family = next(f for f in FAMILIES if name.startswith(f))
            named = name in LABELS
            ax.scatter(m[x_key], max(m[y_key], floor), s=60 if named else 22, color=FAMILIES[family],
                       alpha=1 if named else 0.45, linewidths=0, zorder=3)  # fmt: skip
            if named:
                label, place = LABELS[name]
                ax.annotate(label, (m[x_key], max(m[y_key], floor)), xytext=place, textcoords="offset points",
                            fontsize=8.5)  # fmt: skip
        front = _front([(m[x_key], max(m[y_key], floor)) for m in means.values()])
        ax.step(*zip(*front, strict=True), where="post", color="0.6", lw=1, zorder=1)
        ax.set(yscale="log", xlabel=x_label, ylabel=y_label)
        ax.margins(x=0.16)
        ax.grid(alpha=0.25)
    left.axvline(128, color="0.5", lw=1, ls=":")
    left.annotate("half of the originals", (128, 1), xycoords=("data", "axes fraction"), xytext=(4, -12),
                  textcoords="offset points", fontsize=8, color="0.4")  # fmt: skip
    left.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}" if y >= 0.01 else f"{y:.1%}")
    right.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    for family, colour in FAMILIES.items():
        left.scatter([], [], color=colour, label=family)
    left.legend(frameon=False, loc="upper right")
    figure.suptitle("SmolLM2, 4,096 tokens, texts that nothing was chosen on: lower and further left is better")
    return figure


def _front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both coordinates, from left to right."""
    best, front = np.inf, []
    for x, y in sorted(points):
        if y < best:
            best = y
            front.append((x, y))
    return front
