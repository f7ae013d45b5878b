"""Which tier-1 format? `python -m benchmarks.study --jobs 2` measures, `--report` draws tables and the Pareto plot.

Every format is audited (`certjax.audit`) on activations of SmolLM2 reading 4,096 tokens of several texts: bytes held
and read, certified and true error, promotions at tolerances of 2, 5 and 10% of the layer norm. Choices were made on the
texts of FIT; the tables that count are those of REPORTED. Exit status 1 on a bound below the error it bounds, or on a
head-step that is neither within its tolerance nor dense.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from rich.progress import Progress

import certjax
from benchmarks import formats
from certjax.audit import audit_captured, spread
from certjax.capture import Captured
from certjax.eval.texts import corpus

FIT = {"emma": "book", "mansfieldpark": "chat"}
REPORTED = {"persuasion": "book", "sensesensibility": "book", "northangerabbey": "chat"}
TOLERANCES = (0.02, 0.05, 0.10)
RESULTS = Path(__file__).parent / "results" / "study.json"


def texts(model, n_tokens: int):
    """Name, kind, set and tokens of every text."""
    novels = corpus()
    for split, names in (("fit", FIT), ("reported", REPORTED)):
        for name, kind in names.items():
            text = conversation(novels[name], model.tokenizer) if kind == "chat" else novels[name][40_000:]
            tokens = model.tokenizer.encode(text)
            if len(tokens) < n_tokens:
                raise SystemExit(f"{name} ({kind}) has {len(tokens)} tokens, {n_tokens} are asked for")
            yield name, kind, split, tokens[:n_tokens]


def conversation(text: str, tokenizer) -> str:
    """A long chat in the model's template: passages of `text` as the two sides' messages."""
    paragraphs = [p.replace("\n", " ") for p in text.split("\n\n") if 80 < len(p) < 600][:400]
    sides = ("user", "assistant")
    return tokenizer.chat([{"role": sides[i % 2], "content": p} for i, p in enumerate(paragraphs)])


def capture_all(folder: Path, n_tokens: int, n_queries: int) -> list[dict]:
    """Activations of every text, stored where the workers find them."""
    model = certjax.load("smollm2", progress=False)
    entries = []
    for name, kind, split, tokens in texts(model, n_tokens):
        seen, positions = spread(model, tokens, n_queries)
        file = folder / f"{name}.npz"
        np.savez(file, q=seen.q, keys=seen.keys, values=seen.values)
        entries.append({"text": name, "kind": kind, "split": split, "file": str(file), "positions": positions})
    return entries


def measure(job: tuple[str, float, list[dict]]) -> list[dict]:
    """One format at one tolerance on every text."""
    name, tolerance, entries = job
    formats.register()
    policy = certjax.Policy.budget(tolerance, **formats.FORMATS[name])
    rows = []
    for entry in entries:
        with np.load(entry["file"]) as stored:
            seen = Captured(**{key: jax.numpy.asarray(stored[key]) for key in ("q", "keys", "values")})
        report = audit_captured(seen, entry["positions"], policy)
        total = report.summary()
        rows.append({
            "format": name, "tolerance": tolerance, **{k: entry[k] for k in ("text", "kind", "split")},
            "held": report.token_bytes, "violations": report.violations, "broken": report.broken,
            "checks_failed": report.checks_failed,
            **{f"{of}_p{q}": float(np.quantile(getattr(report, of), q / 100))
               for of in ("certified", "true") for q in (50, 90, 99)},
            **{k: total[k] for k in ("head_steps", "promoted_blocks_mean", "dense_share", "bytes_stored_over_dense",
                                     "bytes_read_over_dense", "bytes_paged_in_over_dense")},
        })  # fmt: skip
    return rows


def run(jobs: int, n_tokens: int, n_queries: int, only: list[str], keep) -> list[dict]:
    """Measure everything; a process a format, so that compilations overlap. `keep(rows)` after every format."""
    work = [
        (name, tolerance)
        for name in (only or formats.FORMATS)
        for tolerance in (TOLERANCES if name in formats.MAIN else (0.05,))
    ]
    with tempfile.TemporaryDirectory() as scratch, Progress() as bar:
        task = bar.add_task("capturing", total=None)
        entries = capture_all(Path(scratch), n_tokens, n_queries)
        bar.update(task, description="formats", total=len(work))
        context = multiprocessing.get_context("spawn")
        rows = []
        with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=4) as pool:
            pending = [pool.submit(measure, (*item, entries)) for item in work]
            for done in concurrent.futures.as_completed(pending):
                rows += done.result()
                keep(rows)
                bar.advance(task)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--queries", type=int, default=4, help="positions of each text, spread over the last 256")
    parser.add_argument("--formats", nargs="*", default=[], choices=list(formats.FORMATS), metavar="FORMAT")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="tables and plot from the stored results, nothing run")
    args = parser.parse_args()
    if args.report:
        from benchmarks import study_report

        study_report.write(json.loads(args.output.read_text()))
        return
    meta = {"jax": jax.__version__, "device": str(jax.devices()[0]), "model": "SmolLM2-135M-Instruct", **vars(args)}
    meta["output"] = args.output.name
    args.output.parent.mkdir(parents=True, exist_ok=True)

    # With --formats the rest of what is stored stays.
    others = json.loads(args.output.read_text())["rows"] if args.formats and args.output.exists() else []
    others = [row for row in others if row["format"] not in args.formats]

    def keep(rows: list[dict]) -> None:
        rows = sorted(others + rows, key=lambda row: (row["format"], row["tolerance"], row["text"]))
        args.output.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")

    rows = run(args.jobs, args.tokens, args.queries, args.formats, keep)
    failed = sum(row["violations"] + row["broken"] for row in rows)
    steps = sum(row["head_steps"] for row in rows)
    print(f"{len(rows)} rows, {steps:,} head-steps, {failed} violations or broken contracts")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
