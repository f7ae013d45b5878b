"""Run benchmarks into a file of records, and go on where a run that was killed stopped.

A batch is run as a whole or not at all, and always with the same samples: the records of a run that was resumed are
those of one that was not.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import certjax
from certjax.errors import InvalidArgumentError
from certjax.eval import engine, records
from certjax.eval.modes import EvalMode
from certjax.eval.records import Record
from certjax.eval.work import Work
from certjax.model import Model


def run(
    model: Model,
    works: Sequence[Work],
    modes: Sequence[EvalMode],
    out: Path,
    *,
    seed: int = 0,
    batch: int = 1,
    progress: bool = False,
) -> list[Record]:
    """Run every sample of `works` in every mode that `out` does not hold yet, and append its record.

    Parameters
    ----------
    seed
        Of the samples, as the records name it.
    batch
        Samples that are decoded together. Outcomes depend on it by rounding only.
    progress
        Draw a progress bar on stderr.

    Returns
    -------
    The records of these works and modes, those that were there before included.

    Raises
    ------
    InvalidArgumentError, ContextLengthError
        Before any work: if `out` cannot be written, is no file of records, or holds other outcomes under the same
        names; if a mode does not fit the model or a context; if a sample does not fit its context.
    """
    check_out(out)
    if batch < 1:
        raise InvalidArgumentError(f"batch must be at least 1, got {batch}.")
    for context in sorted({work.context for work in works}):
        for mode in modes:
            engine.check_fit(model, mode, context)
    for work in works:
        work.prepare(work.samples[:1])
    model_id = fingerprint(model)
    plan = {
        (work.benchmark, work.task, work.context, i, seed, mode.label): config
        for work in works
        for mode in modes
        for config in [_config(model_id, work, mode)]
        for i in work.samples
    }
    done = _done(out, plan)
    records.repair(out)
    made_with = versions(model)
    with _bar(progress) as bar:
        progressed = bar.add_task("", total=len(plan), completed=len(done))
        for group in _families(works):
            lead, tasks = group[0], ", ".join(work.task for work in group)
            for rows in _batches([(work, i) for work in group for i in work.samples], batch):
                prepared = prefilled = None
                for mode in modes:
                    names = [(work.benchmark, work.task, work.context, i, seed, mode.label) for work, i in rows]
                    if done.issuperset(names):
                        continue
                    bar.update(progressed, description=f"{lead.benchmark} {tasks} {lead.context} {mode.label}")
                    if prefilled is None:
                        prepared = [sample for work, i in rows for sample in work.prepare([i])]
                        prefilled = lead.prefill(model, prepared)
                    outcomes = zip(names, lead.run(model, mode, prepared, prefilled), strict=True)
                    fresh = {name: outcome for name, outcome in outcomes if name not in done}  # a repeated row once
                    made = (_record(name, plan[name], made_with, outcome) for name, outcome in fresh.items())
                    records.write(out, made)
                    bar.advance(progressed, len(fresh))
    return [record for record in records.read(out) if _name(record) in plan]


def check_out(out: Path) -> None:
    """Refuse a path that records cannot be appended to. Nothing is written.

    Raises
    ------
    InvalidArgumentError
    """
    if not out.parent.is_dir():
        raise InvalidArgumentError(f"{out}: there is no directory {out.parent}; create it first.")
    if out.exists():
        if not out.is_file():
            raise InvalidArgumentError(f"{out} is no file; name one that ends in .jsonl.")
        with out.open("rb") as file:
            if records.is_compressed(file.read(8)):
                raise InvalidArgumentError(f"{out} is compressed, and nothing can be appended to it; decompress it.")
        for _ in records.read(out):
            pass


def versions(model: Model) -> dict[str, str]:
    """The model's name, and versions of what outcomes may depend on: by rounding, or by the words that are drawn."""
    device = jax.devices()[0]
    return {
        "model": model.name,
        "certjax": certjax.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "wonderwords": _installed("wonderwords"),
        "device": getattr(device, "device_kind", device.platform),
    }


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def fingerprint(model: Model) -> str:
    """Stands for configuration and parameters, wherever they were loaded from."""
    sums = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(_sums(model.params))}
    shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), model.params)
    return _digest([str(model.config), str(shapes), {path: int(x) for path, x in sums.items()}])


@jax.jit
def _sums(params: Any) -> Any:
    """Of each leaf's bits, weighted by place, modulo 2^32: the same on every device."""

    def one(x):
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32).ravel()
        return jnp.sum(bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)

    return jax.tree.map(one, params)


def _config(model_id: str, work: Work, mode: EvalMode) -> str:
    return _digest([model_id, work.benchmark, work.task, work.options(), mode.to_dict(), records.SCHEMA])


def _digest(of: Any) -> str:
    return hashlib.sha256(json.dumps(of, sort_keys=True, default=str).encode()).hexdigest()[:16]


_NAME = ("benchmark", "task", "context", "sample", "seed", "mode")


def _name(record: Record) -> tuple:
    return tuple(getattr(record, field) for field in _NAME)


def _done(out: Path, plan: dict[tuple, str]) -> set[tuple]:
    """Names of the plan that `out` has records of."""
    cells = {(*name[:3], *name[4:]): config for name, config in plan.items()}
    done = set()
    for record in records.read(out) if out.exists() else ():
        name = _name(record)
        expected = cells.get((*name[:3], *name[4:]), record.config)
        if record.config != expected:
            raise InvalidArgumentError(
                f"{out} holds records of {record.benchmark} {record.task} at {record.context} tokens in mode "
                f"{record.mode!r} (seed {record.seed}) that come from another model, policy, text or version; give "
                "another --out."
            )
        if name in plan:
            done.add(name)
    return done


def _record(name: tuple, config: str, made_with: dict[str, str], outcome: dict[str, Any]) -> Record:
    return Record(**dict(zip(_NAME, name, strict=True)), config=config, versions=made_with, **outcome)


def _families(works: Sequence[Work]) -> list[list[Work]]:
    """Works that share batches, in the order of their first."""
    families: dict[Hashable, list[Work]] = {}
    for work in works:
        families.setdefault(work.kin, []).append(work)
    return list(families.values())


_Row = TypeVar("_Row")


def _batches(rows: Sequence[_Row], batch: int) -> Iterator[list[_Row]]:
    """Even batches of one size, so that each program is compiled once; the last row fills the last one up."""
    n = -(-len(rows) // batch)
    size = -(-len(rows) // n)
    for first in range(0, len(rows), size):
        chosen = list(rows[first : first + size])
        yield chosen + chosen[-1:] * (size - len(chosen))


def _bar(show: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), disable=not show,
    )  # fmt: skip


# -- what is printed of it ----------------------------------------------------------------------------


def overview(found: Sequence[Record]) -> list[dict[str, Any]]:
    """A row a benchmark, task, context and mode, in the order of the records: samples, perplexity or mean score, the
    mean and largest bound before heads went dense, the share of dense head-steps, seconds a sample."""
    cells: dict[tuple, list[Record]] = {}
    for record in found:
        cells.setdefault((record.benchmark, record.context, record.task, record.mode), []).append(record)
    rows = []
    for (benchmark, context, task, mode), of in cells.items():
        certificates = [record.certificate for record in of if record.certificate]
        steps = sum(c.head_steps for c in certificates)
        row = {"benchmark": benchmark, "context": context, "task": task, "mode": mode, "samples": len(of)}
        if benchmark == "ppl":
            row["perplexity"] = float(np.exp(np.mean(np.concatenate([record.token_nll for record in of]))))
        else:
            row["score"] = float(np.mean([record.score for record in of]))
        row["bound_mean"] = sum(c.before_mean * c.head_steps for c in certificates) / steps if steps else None
        row["bound_max"] = max(c.before_max for c in certificates) if steps else None
        row["dense"] = sum(sum(c.rungs[3:]) for c in certificates) / steps if steps else None
        row["seconds"] = float(np.mean([record.seconds for record in of]))
        rows.append(row)
    return rows
