"""`certjax audit`: a tier-1 format measured on a real model and text."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from certjax.audit import AuditReport, audit
from certjax.capture import CHUNK
from certjax.cli.common import clean_errors, json_option, print_json, use_compilation_cache
from certjax.codecs import REGISTRY
from certjax.errors import CertjaxError, InvalidArgumentError
from certjax.model import Model, load
from certjax.policy import Policy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Widths(click.ParamType):
    """Bits of the planes of a code: "8,4"."""

    name = "bits"

    def convert(self, value, param, ctx) -> tuple[int, ...]:
        try:
            return tuple(int(x) for x in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of widths in bits such as 8,4.", param, ctx)


@click.command("audit")
@click.option("--model", "name", default="smollm2", show_default=True, help="'smollm2' or a converted directory.")
@click.option(
    "--text", "file", required=True, type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    help="Text for the model to read, UTF-8; '-' is stdin.",
)  # fmt: skip
@click.option("--codec", type=click.Choice(sorted(REGISTRY)), default="planes", show_default=True)
@click.option("--tokens", type=click.IntRange(min=CHUNK), default=4096, show_default=True,
              help=f"Tokens to read at most; rounded down to a multiple of {CHUNK}.")  # fmt: skip
@click.option("--queries", type=click.IntRange(1, CHUNK), default=8, show_default=True,
              help=f"Positions to query, spread over the last {CHUNK}.")  # fmt: skip
@click.option("--tolerance", type=float, default=0.05, show_default=True, help="Fraction of the layer norm.")
@click.option("--block-size", type=int, default=16, show_default=True)
@click.option("--windows/--no-windows", default=True, show_default=True,
              help="Keep 16 first and 128 recent tokens in original precision.")  # fmt: skip
@click.option("--fp8-scale", type=click.Choice(["tensor", "head"]), help="fp8_e4m3: one scale a tensor or a KV head.")
@click.option("--group-size", type=int, help="int8_*, kivi_*: channels of a value that share a scale.")
@click.option("--key-planes", type=Widths(), help="planes: bits of each plane of a key.  [default: 8,4]")
@click.option("--value-planes", type=Widths(), help="planes: bits of each plane of a value.  [default: 4,2]")
@click.option("--heatmap", type=click.Path(dir_okay=False, path_type=Path), help="Draw errors by layer and head here.")
@json_option
def audit_command(
    name, file, codec, tokens, queries, tolerance, block_size, windows, fp8_scale, group_size, key_planes, value_planes,
    heatmap, as_json,
) -> None:  # fmt: skip
    """Measure what a format loses on a text, what can be certified, and what fallback would cost.

    Exit status 1 if an error exceeds its bound.
    """
    use_compilation_cache()
    with clean_errors():
        options = {"fp8_scale": fp8_scale, "group_size": group_size, "key_planes": key_planes,
                   "value_planes": value_planes}  # fmt: skip
        policy = _policy(codec, tolerance, block_size, windows, {k: v for k, v in options.items() if v is not None})
        if heatmap is not None:
            _check_drawable(heatmap)
        text = _read(file)
        model = load(name, progress=not as_json)
        report = audit(model, _tokens(model, text, tokens), policy, n_queries=queries, progress=not as_json)
    title = "stdin" if file == "-" else Path(file).stem
    if heatmap is not None:
        draw(report, title).savefig(heatmap, dpi=150)
    if as_json:
        print_json({"text": title, "device": str(jax.devices()[0]), "report": report.to_dict()})
    else:
        _print(report, title)
        if heatmap is not None:
            click.echo(f"wrote {heatmap}")
    sys.exit(1 if report.violations or report.broken else 0)


def _policy(codec: str, tolerance: float, block_size: int, windows: bool, options: dict) -> Policy:
    kept = {} if windows else {"sink_tokens": 0, "recent_tokens": 0}
    policy = Policy.budget(tolerance, codec=codec, block_size=block_size, **kept, **options)
    known = {field.name for field in dataclasses.fields(policy.make_codec())}
    for option in sorted(options.keys() - known):
        raise InvalidArgumentError(f"--{option.replace('_', '-')} is no option of --codec {codec}; leave it out.")
    return policy


def _read(file: str) -> str:
    try:
        with click.open_file(file, encoding="utf-8") as stream:
            return stream.read()
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"--text {file} is not UTF-8 ({error}); convert it first.") from error


def _tokens(model: Model, text: str, limit: int) -> list[int]:
    """As many whole chunks as the text, `--tokens` and the context allow."""
    if model.tokenizer is None:
        raise InvalidArgumentError(f"model {model.name} has no tokenizer.json, so it reads no text; convert it again.")
    context = model.config.context_length
    if context < CHUNK:
        raise InvalidArgumentError(f"an audit needs {CHUNK} tokens, the context of --model {model.name} is {context}.")
    tokens = model.tokenizer.encode(text)
    if len(tokens) < CHUNK:
        raise InvalidArgumentError(f"--text has {len(tokens)} tokens, an audit needs {CHUNK}; give a longer text.")
    return tokens[: min(len(tokens), limit, context) // CHUNK * CHUNK]


# -- what is printed ----------------------------------------------------------------------------------


def _print(report: AuditReport, title: str) -> None:
    policy, codec, allowed = report.policy, report.policy.make_codec(), percent(report.policy.tolerance)
    console, n_layers = Console(highlight=False, markup=False), report.true.shape[1]
    options = [f"{f.name}={getattr(codec, f.name)}" for f in dataclasses.fields(codec) if f.init and f.name != "name"]
    header = _table()
    for row in (
        ("model", report.model),
        ("text", f"{title}, {report.n_tokens:,} tokens, queried at {len(report.positions)} of the last {CHUNK}"),
        ("format", f"{codec.name}, {', '.join(options)}, block_size={policy.block_size}"),
        ("windows", f"first {policy.sink_tokens} and last {policy.recent_tokens} tokens in original precision"),
        ("bytes a token", f"{report.token_bytes:.1f} per KV head, annotations included: "
                          f"{report.token_bytes / report.token_bytes_original:.2f}x of the originals"),
        ("errors", "of the layer norm, as stored; last two columns with fallback"),
    ):  # fmt: skip
        header.add_row(*row)
    console.print(header)

    table = _table("layer", "certified\nmedian", "\nmax", f"\n> {allowed}", "true\nmedian", "\nmax", f"\n> {allowed}",
                   "promoted\nblocks", "\ndense")  # fmt: skip
    for layer in range(n_layers):
        table.add_row(str(layer), *_cells(report.summary(layer)), end_section=layer == n_layers - 1)
    table.add_row("all", *_cells(report.summary()), style="bold")
    console.print("", table, "")

    worst, certified = report.worst_heads("true"), report.worst_heads("certified")
    click.echo(f"Above {allowed} somewhere, of {report.true[0].size} heads: {len(worst)} by their true error, "
               f"{len(certified)} by their bound.")  # fmt: skip
    worst += [head for head in certified if head not in worst]
    if worst:
        table = _table("layer", "head", "true max", "certified max")
        for head in worst[:10]:
            table.add_row(str(head["layer"]), str(head["head"]), percent(head["true"]), percent(head["certified"]))
        console.print(table)
    click.echo(f"\n{conclusion(report)}")


def _table(*columns: str) -> Table:
    """Without a frame; the columns, if any are named, right-aligned."""
    table = Table(show_header=bool(columns), box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _cells(of: dict) -> list[str]:
    cells = []
    for name in ("certified", "true"):
        above = of[f"{name}_above_tolerance"] / of["head_steps"]
        cells += [percent(of[f"{name}_median"]), percent(of[f"{name}_max"]), percent(above)]
    return [*cells, f"{of['promoted_blocks_mean']:.1f}", percent(of["dense_share"])]


def percent(x: float | None) -> str:
    """A fraction in per cent, two digits or more; "inf" for None."""
    return "inf" if x is None else f"{x:.0%}" if x == 0 or x >= 0.0995 else f"{100 * x:.2g}%"


def conclusion(report: AuditReport) -> str:
    """What the audit says, in a sentence."""
    if report.violations or report.broken:
        return (f"{report.violations} errors exceed their bound and {report.broken} head-steps their tolerance: a bug "
                "in certjax, please report it.")  # fmt: skip
    of, allowed = report.summary(), percent(report.policy.tolerance)
    n, read, paged = of["head_steps"], of["bytes_read_over_dense"], of["bytes_paged_in_over_dense"]
    stored, certified = of["bytes_stored_over_dense"], n - of["certified_above_tolerance"]
    sentence = (
        f"True error above {allowed} of the layer norm on {of['true_above_tolerance']:,} of {n:,} head-steps; "
        f"certified within {allowed} as stored on {certified:,}, at {stored:.2f}x of dense bytes; certified or dense "
        f"with fallback on all ({percent(of['dense_share'])} dense), at {read + paged:.2f}x "
        f"({read:.2f}x from the device, {paged:.2f}x from the host)."
    )
    if report.checks_failed:
        sentence += f" On {report.checks_failed:,} a check failed and dense attention answered in place of the format."
    return sentence


# -- the heat map -------------------------------------------------------------------------------------


def _check_drawable(path: Path) -> None:
    """Before minutes of work."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CertjaxError('--heatmap needs matplotlib; run pip install "certjax[eval]".') from error
    if not path.parent.is_dir():
        raise InvalidArgumentError(f"--heatmap {path}: there is no directory {path.parent}; create it first.")
    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:] not in kinds:
        raise InvalidArgumentError(f"--heatmap {path}: name a file that ends in one of {', '.join(kinds)}.")


def draw(report: AuditReport, title: str) -> Figure:
    """Largest true and certified error of every head on one logarithmic scale, white at the tolerance."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    tolerance, maps = report.policy.tolerance, (report.heads["true_max"], report.heads["certified_max"])
    n_layers, n_heads = maps[0].shape
    away = [np.abs(np.log10(x[np.isfinite(x) & (x > 0)] / tolerance)) for x in maps]
    reach = 10 ** np.clip(np.max(np.concatenate([*away, [0.0]])), 1, 3)  # what lies further has the colour of the end
    scale = LogNorm(tolerance / reach, tolerance * reach, clip=True)
    figure = Figure(figsize=(4 + min(0.4 * n_heads, 12), 2 + min(max(0.18 * n_layers, 2), 14)), layout="constrained")
    figure.suptitle(f"{report.policy.codec} on {title}: largest error of each head as a share of the layer norm")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, x, name in zip(axes, maps, ("true error", "certified error"), strict=True):
        x = np.clip(x, scale.vmin, scale.vmax)
        image = axis.imshow(x, norm=scale, cmap="RdBu_r", aspect="auto", interpolation="nearest")
        axis.set(title=f"{name}\n{(x > tolerance).sum()} of {x.size} heads above {percent(tolerance)}", xlabel="head")
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("layer")
    bar = figure.colorbar(image, ax=axes, format=FuncFormatter(lambda x, _: percent(x)))
    bar.ax.axhline(tolerance, color="black", linewidth=2)
    bar.ax.set_title(f"tolerance\n{percent(tolerance)}", fontsize="medium")
    return figure
