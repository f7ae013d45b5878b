"""The summary as tables of text: Markdown for the report, and rows for the terminal."""

from __future__ import annotations

import dataclasses
from typing import Any

from certjax.eval.predict import LOWER, PREDICTORS, QUANTILES
from certjax.eval.summary import ALL

NONE = "–"
TOKEN_PREDICTOR = "token_bound"


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading, what its columns mean, a table, and the figures that show it (beginnings of file names).

    The first `short` columns are for the terminal too.
    """

    title: str
    text: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    figures: tuple[str, ...] = ()
    short: int = 0


def sections(report: dict[str, Any], audits: list[dict[str, Any]] = ()) -> list[Section]:
    """Those that have rows. `audits`: what `certjax audit --json` printed."""
    parts = [
        _losses(report),
        _scores(report, "niah", "Needles in a haystack"),
        _scores(report, "ruler", "RULER"),
        _tasks(report),
        _texts(report),
        _costs(report),
        _heads(report),
        _knows(report),
        _monitor(report),
        _audits(audits),
    ]
    return [part for part in parts if part.rows]


def markdown(report: dict[str, Any], audits: list[dict[str, Any]] = (), figures: list[str] = ()) -> str:
    """The report. `figures`: files in its directory."""
    lines = ["# Evaluation", "", *_header(report), ""]
    if report["notes"]:
        lines += ["**To note**", "", *(f"- {note}" for note in report["notes"]), ""]
    lines += ["## How the numbers were made", "", *(f"- {line}" for line in _method(report)), ""]
    for part in sections(report, audits):
        lines += [f"## {part.title}", "", part.text, "", table(part.header, part.rows)]
        for name in (name for name in figures if name.startswith(part.figures or "\0")):
            lines += [f"![{part.title}: {name.removesuffix('.png').replace('_', ' ')}]({name})", ""]
    return "\n".join(lines).rstrip() + "\n"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Of Markdown."""
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _header(report: dict[str, Any]) -> list[str]:
    lines = [f"{report['records']:,} records; deltas are against `{report['baseline']}`, on the same samples.", ""]
    if report["shared"]:
        lines.append(f"- {shared(report)}")
    for mode, configs in report["modes"].items():
        few = f"configuration {', '.join(configs)}" if len(configs) <= 3 else f"{len(configs)} configurations"
        lines.append(f"- mode `{mode}`: {few}")
    return lines + [
        "- made with " + ", ".join(f"{name} {version}" for name, version in of.items()) for of in report["versions"]
    ]


def shared(report: dict[str, Any]) -> str:
    """Options that labels leave out."""
    return f"all modes{' but `dense`' if 'dense' in report['modes'] else ''}: {', '.join(report['shared'])}"


def _method(report: dict[str, Any]) -> list[str]:
    base = report["baseline"]
    return [
        f"Intervals, in brackets, are two-sided, {report['level']:.0%}, and like the p-values not corrected for the "
        "number of comparisons: a correction would make it easier to claim that modes do not differ. Wide intervals "
        "are no evidence that they agree.",
        "Perplexity: exp of the mean loss over all tokens. Its deltas are means over windows of the difference to "
        f"`{base}`, of the loss and of the window's perplexity, with Student's interval over windows.",
        f"Scores: means over tasks of the share of references found; intervals by {report['resamples']:,} bootstrap "
        f"resamples of samples within tasks (percentiles, seed {report['seed']}). An interval without width means that "
        "no sample differs, not that none would.",
        "Right: all references found. Shares of critical failures have exact intervals (Clopper-Pearson).",
        f"Critical: `{base}` right, the mode wrong; reverse: the other way round. p: McNemar's exact test, two-sided.",
    ]


# -- quality ------------------------------------------------------------------------------------------


_OF_LOSSES = ("context", "text", "mode", "perplexity", "delta nats a token", "delta perplexity", "windows", "tokens")


def _losses(report: dict[str, Any]) -> Section:
    """A row a context and mode, all texts together."""
    text = "Teacher-forced loss on running text. Deltas are per window and paired."
    return Section("Perplexity", text, _OF_LOSSES, _loss_rows(_overall(report["ppl"])), ("ppl",), short=6)


def _texts(report: dict[str, Any]) -> Section:
    overall = _overall(report["ppl"])
    rows = _loss_rows([r for r in report["ppl"] if r not in overall])
    return Section("Perplexity by text", "Every text alone.", _OF_LOSSES, rows)


def _loss_rows(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (*_where(r), number(r["ppl"], "#.4g"), estimate(r.get("delta_nll"), "+.5f"),
         estimate(r.get("delta_ppl"), "+.4f"), f"{r['samples']:,}", f"{r['tokens']:,}")
        for r in rows
    ]  # fmt: skip


def _scores(report: dict[str, Any], benchmark: str, title: str) -> Section:
    """A row a context and mode, all tasks together."""
    rows = [
        (f"{r['context']:,}", r["mode"], str(r["tasks"]), f"{r['passed']} of {r['samples']}", estimate(r["score"]),
         estimate(r.get("delta_score"), "+.3f"), *_failures(r), estimate(r.get("delta_pass_rate"), "+.3f"),
         estimate(r.get("critical_rate")), _percent(r.get("same_text")))
        for r in _overall(report[benchmark])
    ]  # fmt: skip
    header = ("context", "mode", "tasks", "right", "score", "delta score", "critical", "reverse", "p",
              "delta share right", "critical, of those right", "same text")  # fmt: skip
    text = (
        "All tasks that a mode was run on, together. Counts and scores compare between modes with the same tasks; "
        f"deltas and failures are against `{report['baseline']}` on a mode's own tasks. *Same text*: continuations "
        f"equal to those of `{report['baseline']}`."
    )
    return Section(title, text, header, rows, (f"{benchmark}_",), short=9)


def _tasks(report: dict[str, Any]) -> Section:
    rows = [
        (*_where(r), f"{r['passed']} of {r['samples']}", estimate(r["score"]), estimate(r.get("delta_score"), "+.3f"),
         *_failures(r))
        for benchmark in ("niah", "ruler")
        for r in report[benchmark]
        if r not in _overall(report[benchmark])
    ]  # fmt: skip
    header = ("context", "task", "mode", "right", "score", "delta score", "critical", "reverse", "p")
    return Section("By task", "Every task alone.", header, rows)


def _overall(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of all tasks, or of the only one."""
    whole = {(r["context"], r["mode"]) for r in rows if r["task"] == ALL}
    return [r for r in rows if r["task"] == ALL or (r["context"], r["mode"]) not in whole]


def _failures(row: dict[str, Any]) -> tuple[str, ...]:
    if "paired" not in row:
        return (NONE,) * 3
    return str(row["critical"]), str(row["reverse"]), f"{row['mcnemar_p']:.3g}"


# -- certificates -------------------------------------------------------------------------------------


def _costs(report: dict[str, Any]) -> Section:
    rows = [
        (r["benchmark"], f"{r['context']:,}", r["mode"], f"{r['device_over_dense']:.3f}", f"{r['host_over_dense']:.3f}",
         *(_percent(x) for x in r["rungs"]), f"{r['checks_failed']:,}", f"{r['head_steps']:,}",
         *(f"{number(r[f'{of}_mean'])}, {number(r[f'{of}_max'])}" for of in ("before", "bound")))
        for r in report["cost"]
    ]  # fmt: skip
    text = (
        "Bytes read from the device and from the host, over those that dense attention reads; head-steps by the rung "
        "they ended on (0 as stored, 1 and 2 with original keys and values, 3 and 4 dense), and those in which a check "
        "failed; bounds as shares of the layer's norm, before heads went dense and of what was returned."
    )
    header = ("benchmark", "context", "mode", "device / dense", "host / dense", *(f"rung {i}" for i in range(5)),
              "checks failed", "head-steps", "bound before: mean, max", "bound: mean, max")  # fmt: skip
    return Section("Bytes, rungs, bounds", text, header, rows, ("rungs", "bytes"), short=11)


def _heads(report: dict[str, Any], most: int = 5) -> Section:
    """Heads that went dense most often, and those that promoted most."""

    def first(rows, unit):
        heads = [(x, f"{i}.{j}") for i, row in enumerate(rows) for j, x in enumerate(row) if x]
        ranked = sorted(heads, key=lambda head: -head[0])[:most]
        return f"{len(heads)} heads" + "".join(f", {name} {unit.format(x)}" for x, name in ranked)

    rows = [
        (mode, benchmark, first(maps["dense"], "({:.1%})"), first(maps["promoted"], "({:.3g})"))
        for mode, benchmarks in report["heads"].items()
        for benchmark, maps in benchmarks.items()
    ]
    text = (
        f"How many heads ever went dense, and the {most} that did so most often, as layer.head with the share of "
        "steps; the same of heads that promoted blocks, with blocks a step. The figures show all, and the bounds."
    )
    return Section("Where heads escalate", text, ("mode", "benchmark", "dense", "promoted"), rows, ("heads",))


# -- prediction ---------------------------------------------------------------------------------------


def _knows(report: dict[str, Any]) -> Section:
    """A row a benchmark, mode and harm: the first predictor in full, the areas of the others."""
    rows = []
    whole = [r for r in report["knows"] if r["context"] == ALL]
    for r in (r for r in whole if r["predictor"] in (PREDICTORS[0], TOKEN_PREDICTOR)):
        same = {x["predictor"]: x for x in whole if (x["mode"], x["benchmark"]) == (r["mode"], r["benchmark"])}
        for harm, of in r["harms"].items():
            others = [same[name]["harms"][harm]["auc"]["value"] if name in same else None for name in PREDICTORS[1:]]
            rows.append(
                (r["benchmark"], r["mode"], harm, f"{of['harmed']:,} of {of['n']:,}", estimate(of["auc"]),
                 estimate(of["auc_within"]), estimate(r["spearman"], "+.2f"),
                 *(NONE if x is None else f"{x:.3f}" for x in others))
            )  # fmt: skip
    text = (
        "Area under the ROC curve: how often a harmed sample or token has the larger bound (0.5 is chance). *Within*: "
        "compared with the unharmed of the same task and context only, so that knowing the task does not count. "
        "Intervals: DeLong, clustered by sample or window. *Rank correlation*: Spearman's, with the size of the harm. "
        f"Harms of a sample: a score below that of `{report['baseline']}`; a wrong answer; a wrong answer where "
        f"`{report['baseline']}` is right. Of a token: a loss that differs by more than so many nats. Bounds are of "
        "the quantized attempt: where heads then went dense, what was returned is better than its bound. The bound of "
        f"a token is the largest of its step; of a sample, `{PREDICTORS[0]}`, which was named before any data; the "
        "last columns have the areas of other bounds. Their intervals and single contexts are in report.json."
    )
    header = ("benchmark", "mode", "harm", "harmed", "area", "area within", "rank correlation", *PREDICTORS[1:])
    return Section("Does the certificate know?", text, header, rows, ("roc",), short=5)


def _monitor(report: dict[str, Any]) -> Section:
    rows = [
        (r["benchmark"], r["mode"], harm, f"{p['quantile']:.0%}", number(p["threshold"]), _percent(p["flagged"]),
         _percent(p["caught"]), _percent(p["false_alarms"]), _percent(p["harmed_of_flagged"]))
        for r in report["knows"]
        if r["context"] == ALL and r["predictor"] in (PREDICTORS[0], TOKEN_PREDICTOR)
        for harm, of in r["harms"].items()
        if of["harmed"] and (r["predictor"] == TOKEN_PREDICTOR or harm == LOWER)
        for p in of["operating"]
    ]  # fmt: skip
    text = (
        f"What a monitor would see that flags bounds (`{PREDICTORS[0]}` of a sample, the largest of a token's step) "
        f"above their {', '.join(f'{q:.0%}' for q in QUANTILES)} quantiles: share of all that is flagged, of the "
        "harmed that is caught, of the unharmed that is flagged, of the flagged that is harmed. Chosen and measured on "
        "the same samples. Other bounds, harms and single contexts are in report.json."
    )
    header = ("benchmark", "mode", "harm", "quantile", "threshold", "flagged", "caught", "false alarms",
              "harmed of flagged")  # fmt: skip
    return Section("Thresholds for a monitor", text, header, rows)


def _audits(audits: list[dict[str, Any]]) -> Section:
    rows = []
    for audit in audits:
        of, total = audit["report"], audit["report"]["total"]
        errors = [", ".join(number(total[f"{x}_{at}"]) for at in ("median", "max")) for x in ("true", "certified")]
        rows.append((of["policy"]["codec"], audit["text"], f"{of['tokens']:,}", f"{total['head_steps']:,}", *errors,
                     str(of["violations"])))  # fmt: skip
    text = "From `certjax audit --json`: errors of the format as stored, as shares of the layer's norm."
    header = ("format", "text", "tokens", "head-steps", "true error: median, max", "bound: median, max", "violations")
    return Section("Bound and true error", text, header, rows, ("bound_vs_error",))


# -- cells --------------------------------------------------------------------------------------------


def _where(row: dict[str, Any]) -> tuple[str, str, str]:
    return f"{row['context']:,}", row["task"], row["mode"]


def estimate(of: dict[str, Any] | None, form: str = ".3f") -> str:
    """ "0.912 [0.880, 0.940]"; the reason where there is no number."""
    if of is None:
        return NONE
    if of["value"] is None:
        return of["reason"]
    if of["low"] is None:
        return f"{of['value']:{form}} [{NONE}]"
    return f"{of['value']:{form}} [{of['low']:{form}}, {of['high']:{form}}]"


def number(x: float | None, form: str = ".4g") -> str:
    """Four digits; "inf" for None."""
    return "inf" if x is None else f"{x:{form}}"


def _percent(x: float | None) -> str:
    return NONE if x is None else f"{x:.2%}" if 0 < x < 0.01 else f"{x:.1%}"
