"""`certjax bench`: attention and whole decode steps, dense, naive and certified side by side."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import click
import jax

from certjax.bench import attention, report, step
from certjax.bench.workloads import WORKLOADS
from certjax.cli.common import clean_errors, json_option, print_json, use_compilation_cache

_contexts = click.option(
    "--contexts", default="8192,32768,65536,131072", show_default=True, help="Tokens in the cache, comma separated."
)
_batches = click.option("--batches", default="1", show_default=True, help="Sequences, comma separated.")
_tolerance = click.option(
    "--tolerance", type=float, default=0.05, show_default=True, help="Certified error, relative to the layer's norm."
)
_out = click.option(
    "--out", type=click.Path(dir_okay=False, path_type=pathlib.Path), help="Write JSON here, and a table beside it."
)


def _whole(name: str, text: str) -> list[int]:
    try:
        numbers = [int(x) for x in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise click.BadParameter(f"give positive whole numbers separated by commas, got {text!r}.", param_hint=name)
    return numbers


def _kinds(text: str) -> list[str]:
    kinds = text.split(",")
    if unknown := [k for k in kinds if k not in WORKLOADS]:
        message = f"unknown {', '.join(unknown)}; choose from {', '.join(WORKLOADS)}."
        raise click.BadParameter(message, param_hint="--workloads")
    return kinds


def _run(measured: Iterable[dict[str, Any]], command: str, table, out: pathlib.Path | None, as_json: bool) -> None:
    """Measure row by row; what has been measured is on disk when the next row begins."""
    if out is not None and not out.parent.is_dir():
        message = f"there is no directory {out.parent}; create it first."
        raise click.BadParameter(message, param_hint="--out")
    device = jax.devices()[0]
    payload = {
        "command": command,
        "device": getattr(device, "device_kind", device.platform),
        "jax": jax.__version__,
        "rows": [],
    }
    for row in measured:
        payload["rows"].append(row)
        name = " ".join(str(row[k]) for k in ("context", "batch", "workload") if k in row)
        click.echo(f"{name}: {row['certified_over_dense']}x dense", err=True)
        if out is not None:
            out.write_text(json.dumps(payload, indent=1) + "\n")
            heading = f"`{command}` on {payload['device']}, JAX {payload['jax']}"
            out.with_suffix(".md").write_text(f"{heading}\n\n{table(payload['rows'])}")
    if as_json:
        print_json(payload)
    else:
        click.echo(table(payload["rows"]))


@click.group("bench")
def bench_command() -> None:
    """Time dense, naive and certified decoding on this machine."""


@bench_command.command("attention")
@_contexts
@_batches
@click.option("--workloads", default=",".join(WORKLOADS), show_default=True, help="Comma separated.")
@_tolerance
@_out
@json_option
def attention_command(contexts, batches, workloads, tolerance, out, as_json) -> None:
    """The attention op of one layer of LLaMA 3.1 8B, with its certificate."""
    _measure("attention", attention.run, report.attention_table, contexts, batches, workloads, tolerance, out, as_json)


@bench_command.command("step")
@_contexts
@_batches
@click.option("--workloads", default="concentrated", show_default=True, help="Comma separated.")
@_tolerance
@click.option("--quick", is_flag=True, help="Certified and dense alone.")
@_out
@json_option
def step_command(contexts, batches, workloads, tolerance, quick, out, as_json) -> None:
    """A whole decode step of LLaMA 3.1 8B's shape with random weights (needs about 60 GB of GPU memory at 128K)."""
    of_8b, what = functools.partial(step.run, step.LLAMA_3_1_8B, quick=quick), "step --quick" if quick else "step"
    _measure(what, of_8b, report.step_table, contexts, batches, workloads, tolerance, out, as_json)


def _measure(what, run, table, contexts, batches, workloads, tolerance, out, as_json) -> None:
    numbers, kinds = (_whole("--contexts", contexts), _whole("--batches", batches)), _kinds(workloads)
    options = f"--contexts {contexts} --batches {batches} --workloads {workloads} --tolerance {tolerance}"
    use_compilation_cache()
    with clean_errors():
        rows = run(attention.default_policy(tolerance), *numbers, kinds)
        _run(rows, f"certjax bench {what} {options}", table, out, as_json)
