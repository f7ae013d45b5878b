"""Records of all modes, compared sample by sample with a baseline: one dictionary of plain types, the same for the same
records in any order.

Levels (perplexity, score, rates) are over a mode's own samples; deltas, tests and critical failures over the samples
that the baseline has too. What is unpaired is counted in `notes`; a mode that was not run on all that the baseline was
run on has one note, which says where it was.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from certjax.errors import InvalidArgumentError
from certjax.eval import predict, stats
from certjax.eval.predict import Pair, right
from certjax.eval.records import Record

SCHEMA = 1
BENCHMARKS = ("ppl", "niah", "ruler")
MODES = ("dense", "naive", "paper", "budget")
ALL = "all"
"""Stands for all tasks, or all contexts."""

_ROWS = ("ppl", "niah", "ruler", "cost", "knows")
"""Parts of the summary that are lists of rows with a mode each."""

_HEADS = {"bound": "bound_by_head", "dense": "dense_by_head", "promoted": "promoted_by_head"}


def summarize(
    records: Iterable[Record], *, baseline: str = "dense", resamples: int = stats.RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """All that the report says.

    Returns
    -------
    `baseline`, `resamples`, `seed`, `level`, `records`, `notes`; `modes` (label to hashes of configurations); `shared`
    (options of all modes but "dense") and `labels` (mode to its label without them); `versions` (each once); `ppl`,
    `niah`, `ruler` (a row a context, task and mode); `cost` (a row a benchmark, context and mode: rungs, bytes,
    checks); `heads` (mode to benchmark to maps `[L][Hq]`); `knows` (a row a mode, benchmark, context and predictor).
    None for what is not finite.

    Raises
    ------
    InvalidArgumentError
        If there are no records, none of the baseline, a mode in two configurations, one sample with two outcomes, two
        prompts or two models.
    """
    records = _unique(records)
    if not records:
        raise InvalidArgumentError("there are no records; run `certjax eval` first.")
    labels, shared = _labels({record.mode for record in records})
    modes = _modes(labels, baseline)
    cells = defaultdict(list)  # (benchmark, context, mode) to records
    for record in records:
        cells[record.benchmark, record.context, record.mode].append(record)
    notes, pairs = _pair(cells, modes, baseline)
    versions = [dict(of) for of in sorted({tuple(sorted(r.versions.items())) for r in records})]
    if len(versions) > 1:
        notes.append(f"records come from {len(versions)} sets of versions or devices; see `versions`")

    def rows(benchmark, row):
        found = [
            {
                "context": context,
                "task": task,
                "tasks": len(tasks) if task == ALL else 1,
                "mode": mode,
                **row(_of(task, own), _of(task, paired)),
            }
            for (name, context, mode), own in _in_order(cells, modes)
            if name == benchmark
            for paired in [pairs.get((name, context, mode), [])]
            for tasks in [sorted({r.task for r in own})]
            for task in ([ALL] if len(tasks) > 1 else []) + tasks
        ]
        return sorted(found, key=lambda r: (r["context"], r["task"] != ALL, r["task"]))  # stable: modes stay in order

    def scores(own, paired):
        return _scores(own, paired, {"resamples": resamples, "seed": seed})

    return _plain(
        {
            "schema": SCHEMA,
            "baseline": baseline,
            "resamples": resamples,
            "seed": seed,
            "level": stats.LEVEL,
            "records": len(records),
            "modes": {mode: sorted({r.config for r in records if r.mode == mode}) for mode in modes},
            "shared": shared,
            "labels": {mode: labels[mode] for mode in modes},
            "versions": versions,
            "notes": notes,
            "ppl": rows("ppl", _losses),
            "niah": rows("niah", scores),
            "ruler": rows("ruler", scores),
            "cost": _costs(cells, modes),
            "heads": _heads(records, modes),
            "knows": _knows(pairs),
        }
    )


def shortened(report: dict[str, Any]) -> dict[str, Any]:
    """The summary with the `labels` of modes in place of their names: what the page and the figures show."""
    labels = report["labels"]
    return {
        **report,
        "baseline": labels[report["baseline"]],
        "labels": {label: label for label in labels.values()},
        "notes": [re.sub("`(.*?)`", lambda name: f"`{labels.get(name[1], name[1])}`", x) for x in report["notes"]],
        **{part: {labels[mode]: of for mode, of in report[part].items()} for part in ("modes", "heads")},
        **{part: [{**row, "mode": labels[row["mode"]]} for row in report[part]] for part in _ROWS},
    }


# -- what belongs together ----------------------------------------------------------------------------


def _unique(records: Iterable[Record]) -> list[Record]:
    """In order, a line that stands in two files once."""
    kept, configs = {}, {}
    for record in records:
        if record.benchmark not in BENCHMARKS:
            raise InvalidArgumentError(f"unknown benchmark {record.benchmark!r}; this report knows {BENCHMARKS}.")
        cell = (record.benchmark, record.task, record.context, record.seed, record.mode)
        if configs.setdefault(cell, record.config) != record.config:
            raise InvalidArgumentError(
                f"{_name(record)} has records of two configurations, {configs[cell]} and {record.config}: they are not "
                "one experiment. Give the files of one, or name the modes apart."
            )
        known = kept.setdefault(record.key, record)
        if known is not record and _outcome(known) != _outcome(record):
            raise InvalidArgumentError(
                f"{_name(record)} has two outcomes of sample {record.sample} (seed {record.seed}) in configuration "
                f"{record.config}; give the files of one run."
            )
    return [kept[key] for key in sorted(kept)]


def _outcome(record: Record) -> str:
    return dataclasses.replace(record, seconds=0.0, versions={}).to_json()


def _name(record: Record) -> str:
    return f"{record.benchmark}/{record.task} at {record.context} tokens, mode {record.mode!r},"


def _labels(modes: set[str]) -> tuple[dict[str, str], list[str]]:
    """Modes without the options that all but "dense" share, and these options. What one mode alone has is its own, and
    no label stands for two modes."""
    options = {mode: [option.strip() for option in mode.partition(":")[2].split(",")] for mode in sorted(modes)}
    others = [of for mode, of in options.items() if mode != "dense"]
    shared = [x for x in others[0] if x and all(x in of for of in others)] if len(others) > 1 else []
    short = {mode: [x for x in of if x not in shared] for mode, of in options.items()}
    labels = {mode: mode.partition(":")[0] + (":" + ",".join(of) if any(of) else "") for mode, of in short.items()}
    if not shared or len(set(labels.values())) < len(labels):
        return {mode: mode for mode in modes}, []
    return labels, shared


def _modes(labels: dict[str, str], baseline: str) -> list[str]:
    """The baseline first, then in the order of `MODES` by what the label begins with."""
    if baseline not in labels:
        raise InvalidArgumentError(
            f"no record is of the baseline {baseline!r}; the modes are {', '.join(sorted(labels))}. Run it, or name "
            "another with --baseline."
        )

    def rank(mode):
        kind = next((i for i, m in enumerate(MODES) if mode.startswith(m)), len(MODES))
        return mode != baseline, kind, labels[mode], mode

    return sorted(labels, key=rank)


def _in_order(cells: dict, modes: list[str]) -> list:
    return sorted(cells.items(), key=lambda x: (BENCHMARKS.index(x[0][0]), x[0][1], modes.index(x[0][2])))


def _pair(cells: dict, modes: list[str], baseline: str) -> tuple[list[str], dict[tuple, list[Pair]]]:
    """Pairs of every mode but the baseline, and notes on where a mode was run and on samples without their partner."""
    notes, pairs = _where_run(cells, modes, baseline), {}
    for benchmark, context in sorted({key[:2] for key in cells}, key=lambda x: (BENCHMARKS.index(x[0]), x[1])):
        base = {_sample(r): r for r in cells.get((benchmark, context, baseline), [])}
        for mode in modes[1:]:
            own = {_sample(r): r for r in cells.get((benchmark, context, mode), [])}
            common = sorted(base.keys() & own.keys())
            tasks = {task for task, *_ in own}
            expected = sum(task in tasks for task, *_ in base)  # of tasks that the mode was run on at all
            lone, missing = len(own) - len(common), expected - len(common)
            where = f"{benchmark} at {context} tokens, mode `{mode}`"
            if lone:
                notes.append(f"unpaired: {lone} samples that `{baseline}` has not ({where})")
            if missing:
                notes.append(f"unpaired: {missing} of {expected} samples of `{baseline}` are missing ({where})")
            for key in common:
                _check_same_prompt(base[key], own[key])
            if common:
                pairs[benchmark, context, mode] = [(base[key], own[key]) for key in common]
    return notes, pairs


def _where_run(cells: dict, modes: list[str], baseline: str) -> list[str]:
    """A note a mode that was not run on all that the baseline was run on; tasks are named where they are fewer."""
    tasks = {key: {r.task for r in of} for key, of in _in_order(cells, modes)}
    whole = {key[:2]: of for key, of in tasks.items() if key[2] == baseline}
    notes = []
    for mode in modes[1:]:
        own = {key[:2]: of for key, of in tasks.items() if key[2] == mode}
        fewer = {cell for cell, of in whole.items() if not of <= own.get(cell, set())}
        if fewer:
            places = (
                f"{benchmark} {context:,}" + (f" ({', '.join(sorted(of))})" if (benchmark, context) in fewer else "")
                for (benchmark, context), of in own.items()
            )
            notes.append(f"`{mode}` was run on: {'; '.join(places)}")
    return notes


def _sample(record: Record) -> tuple:
    return record.task, record.sample, record.seed


def _check_same_prompt(a: Record, b: Record) -> None:
    def prompt(r):
        return r.prompt_tokens, r.references, None if r.token_nll is None else len(r.token_nll)

    if prompt(a) != prompt(b):
        raise InvalidArgumentError(
            f"{_name(b)} had another prompt in sample {b.sample} (seed {b.seed}) than {a.mode!r}: its length or what "
            "was looked for differ. Run both again with one version and one tokenizer."
        )


def _of(task: str, items: list) -> list:
    """Records, or pairs, of a task."""
    return [x for x in items if task == ALL or (x if isinstance(x, Record) else x[0]).task == task]


def _by_task(pairs: Sequence[Pair], value) -> list[list[float]]:
    by_task = defaultdict(list)
    for pair in pairs:
        by_task[pair[0].task].append(value(*pair))
    return [by_task[task] for task in sorted(by_task)]


# -- quality ------------------------------------------------------------------------------------------


def _losses(own: list[Record], paired: list[Pair]) -> dict[str, Any]:
    """Perplexity over all tokens; deltas by window, Student's intervals."""
    n_tokens = sum(len(r.token_nll) for r in own)
    nll = math.fsum(math.fsum(r.token_nll) for r in own) / n_tokens if all(math.isfinite(r.nll) for r in own) else None
    row = {"samples": len(own), "tokens": n_tokens, "nll": nll, "ppl": None if nll is None else _exp(nll)}
    if not paired:
        return row
    return row | {
        "paired": len(paired),
        "delta_nll": _asdict(stats.t_interval([b.nll - a.nll for a, b in paired])),
        "delta_ppl": _asdict(stats.t_interval([_exp(b.nll) - _exp(a.nll) for a, b in paired])),
    }


def _scores(own: list[Record], paired: list[Pair], bootstrap: dict[str, int]) -> dict[str, Any]:
    """Scores as means over tasks; passes (all references found) as counts; both against the baseline."""
    scores = _by_task([(r, r) for r in own], lambda r, _: r.score)
    row = {
        "samples": len(own),
        "score": _asdict(stats.bootstrap_mean(scores, **bootstrap)),
        "passed": sum(map(right, own)),
        "pass_rate": _asdict(stats.share(sum(map(right, own)), len(own))),
    }
    if not paired:
        return row
    test = stats.mcnemar(*zip(*((right(a), right(b)) for a, b in paired), strict=True))
    deltas = {
        "delta_score": _by_task(paired, lambda a, b: b.score - a.score),
        "delta_pass_rate": [[float(right(b)) - right(a) for a, b in paired]],
    }
    return row | {
        "paired": len(paired),
        **{name: _asdict(stats.bootstrap_mean(of, **bootstrap)) for name, of in deltas.items()},
        "critical": test.critical,
        "critical_rate": _asdict(stats.share(test.critical, sum(right(a) for a, _ in paired))),
        "reverse": test.reverse,
        "mcnemar_p": test.p,
        "same_text": sum(a.prediction == b.prediction for a, b in paired) / len(paired),
    }


# -- certificates -------------------------------------------------------------------------------------


def _certified(record: Record) -> bool:
    """Not in dense mode, nor where the first token, which prefill gives, was the last."""
    return record.certificate is not None and record.certificate.head_steps > 0


def _costs(cells: dict, modes: list[str]) -> list[dict[str, Any]]:
    """Rungs, checks and bounds of head-steps; bytes of steps as shares of what dense attention reads."""
    rows = []
    for (benchmark, context, mode), records in _in_order(cells, modes):
        certificates = [r.certificate for r in records if _certified(r)]
        if not certificates:
            continue
        head_steps = [c.head_steps for c in certificates]

        def mean(of, certificates=certificates, head_steps=head_steps):
            return _mean([getattr(c, of) for c in certificates], head_steps)

        dense = mean("bytes_dense")
        rows.append(
            {
                "benchmark": benchmark,
                "context": context,
                "mode": mode,
                "samples": len(certificates),
                "head_steps": sum(head_steps),
                "rungs": (np.sum([c.rungs for c in certificates], axis=0) / sum(head_steps)).tolist(),
                "checks_failed": sum(c.checks_failed for c in certificates),
                "device_over_dense": mean("bytes_read") / dense,
                "host_over_dense": mean("bytes_paged_in") / dense,
                **{of: mean(of) for of in ("bound_mean", "before_mean")},
                **{of: max(getattr(c, of) for c in certificates) for of in ("bound_max", "before_max")},
            }
        )
    return rows


def _heads(records: list[Record], modes: list[str]) -> dict[str, Any]:
    """Means over samples, weighted by head-steps, of what each head was bounded by, went dense and promoted."""
    seen = defaultdict(list)
    for record in records:
        if _certified(record):
            seen[modes.index(record.mode), BENCHMARKS.index(record.benchmark)].append(record.certificate)
    shapes = {np.shape(getattr(c, of)) for cs in seen.values() for c in cs for of in _HEADS.values()}
    if len(shapes) > 1:
        raise InvalidArgumentError(f"records of models with (layers, heads) {sorted(shapes)}; give one model's files.")
    maps = defaultdict(dict)
    for (mode, benchmark), certificates in sorted(seen.items()):
        weights = [c.head_steps for c in certificates]
        maps[modes[mode]][BENCHMARKS[benchmark]] = {
            name: _mean([getattr(c, of) for c in certificates], weights) for name, of in _HEADS.items()
        }
    return dict(maps)


def _knows(pairs: dict[tuple, list[Pair]]) -> list[dict[str, Any]]:
    """`predict` for every context, then all contexts together with their curves."""
    rows = []
    for (benchmark, mode), keys in _grouped(pairs, lambda key: (key[0], key[2])):
        contexts = [(key[1], pairs[key]) for key in keys]
        together = [(ALL, list(itertools.chain.from_iterable(of for _, of in contexts)))]
        for context, of in (contexts if len(contexts) > 1 else []) + together:
            of = [pair for pair in of if _certified(pair[1])]
            if of:
                seen = (predict.of_tokens if benchmark == "ppl" else predict.of_samples)(of)
                found = predict.predict(seen, curves=context == ALL)
                rows += [{"mode": mode, "benchmark": benchmark, "context": context, **row} for row in found]
    return rows


def _grouped(keys: Iterable[tuple], by) -> list[tuple]:
    groups = defaultdict(list)
    for key in keys:
        groups[by(key)].append(key)
    return list(groups.items())


# -- plain numbers ------------------------------------------------------------------------------------


def _mean(values: list, weights: list[int]) -> Any:
    """Weighted, by element."""
    return np.average(np.array(values, float), axis=0, weights=weights).tolist()


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _asdict(estimate: stats.Estimate) -> dict[str, Any]:
    return dataclasses.asdict(estimate)


def _plain(x: Any) -> Any:
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    if isinstance(x, dict):
        return {key: _plain(value) for key, value in x.items()}
    if isinstance(x, list):
        return [_plain(value) for value in x]
    return x
