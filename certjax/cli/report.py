"""`certjax report`: records of `certjax eval` as tables, statistics and figures."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from certjax.cli.common import clean_errors, json_option, print_json, wide_console
from certjax.errors import CertjaxError, InvalidArgumentError

if TYPE_CHECKING:
    from certjax.eval.render import Section

_AUDIT = ("policy", "tokens", "violations", "total", "heads")
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("report")
@click.argument("files", nargs=-1, required=True, type=_FILE)
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path),
              help="Directory for report.md, report.json and the figures; made where it is missing.")  # fmt: skip
@click.option("--audit", "audit_files", multiple=True, type=_FILE,
              help="Output of `certjax audit --json`: bounds against true errors. May be repeated.")  # fmt: skip
@click.option("--baseline", default="dense", show_default=True, help="Mode that the others are compared with.")
@click.option("--bootstrap", "resamples", type=click.IntRange(min=100), default=10_000, show_default=True,
              help="Resamples of a bootstrap.")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the bootstrap.")
@click.option("--plots/--no-plots", default=True, show_default=True, help="Draw the figures.")
@json_option
def report_command(files, out, audit_files, baseline, resamples, seed, plots, as_json) -> None:
    """Compare the modes in FILES, JSON lines that `certjax eval` wrote, sample by sample. Files may be compressed by
    gzip or xz."""
    with clean_errors():
        _require("scipy", "certjax report")
        if plots:
            _require("matplotlib", "a report with figures (leave them out with --no-plots)")
        from certjax.eval import records, render, summary

        audits = [_read_audit(path) for path in audit_files]
        read = [record for path in files for record in records.read(path)]
        report = summary.summarize(read, baseline=baseline, resamples=resamples, seed=seed)
        shown = summary.shortened(report)
        figures = {}
        if plots:
            from certjax.eval.plots import draw

            figures = draw(shown, audits)
        _write(out, report, render.markdown(shown, audits, list(figures)), figures)
    if as_json:
        print_json(report)
        return
    console = wide_console()
    if shown["shared"]:
        console.print(render.shared(shown), "", sep="\n")
    for part in render.sections(shown, audits):
        if part.short:
            console.print(part.title, style="bold")
            console.print(_table(part), "")
    for note in shown["notes"]:
        click.echo(f"note: {note}")
    click.echo(f"wrote {out}: report.md, report.json" + (f", {len(figures)} figures" if plots else ""))


def _require(module: str, what: str) -> None:
    """Before any work."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise CertjaxError(f'{what} needs {module}; run pip install "certjax[eval]".') from error


def _read_audit(path: Path) -> dict[str, Any]:
    try:
        audit = json.loads(path.read_text(encoding="utf-8"))
        missing = {"text", "report"} - audit.keys() or {*_AUDIT} - audit["report"].keys()
    except (ValueError, AttributeError) as error:
        raise InvalidArgumentError(f"--audit {path} is not what `certjax audit --json` prints ({error}).") from error
    if missing:
        raise InvalidArgumentError(f"--audit {path} lacks {min(missing)!r}: give what `certjax audit --json` printed.")
    return audit


def _write(out: Path, report: dict[str, Any], text: str, figures: dict) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        (out / "report.md").write_text(text, encoding="utf-8")
        for name, figure in figures.items():
            figure.savefig(out / name, dpi=120)
    except OSError as error:
        raise CertjaxError(f"--out {out} cannot be written: {error}") from error


def _table(part: Section) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in part.header[: part.short]:
        table.add_column(column, justify="right", overflow="fold", no_wrap=column != "mode")
    for row in part.rows:
        table.add_row(*row[: part.short])
    return table
