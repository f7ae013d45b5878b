"""`certjax eval`: perplexity, needles in a haystack and RULER, in every mode on the same samples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from certjax.cli.common import (
    clean_errors,
    json_option,
    kv_dtype_option,
    print_json,
    use_compilation_cache,
    wide_console,
)
from certjax.errors import InvalidArgumentError
from certjax.eval import run as runner
from certjax.eval.answers import Questions, source_of
from certjax.eval.modes import PRESETS, EvalMode, parse_modes
from certjax.eval.perplexity import windows
from certjax.eval.tasks import DEFAULT, make_task
from certjax.eval.texts import corpus
from certjax.eval.work import Work
from certjax.model import Model, load


class Listed(click.ParamType):
    """Words, or positive whole numbers, separated by commas; each once."""

    def __init__(self, numbers: bool = False):
        self.name = "N,N,..." if numbers else "NAME,NAME,..."
        self._numbers = numbers

    def convert(self, value, param, ctx) -> tuple:
        if isinstance(value, tuple):
            return value
        words = [word.strip() for word in value.split(",")]
        if self._numbers:
            if not all(word.isdecimal() and int(word) > 0 for word in words):
                self.fail(f"{value!r} is not a list of positive whole numbers separated by commas.", param, ctx)
            words = [int(word) for word in words]
        if not all(words) or len(set(words)) < len(words):
            self.fail(f"{value!r} has an empty or repeated part.", param, ctx)
        return tuple(words)


class Named(click.ParamType):
    """TASK=FILE."""

    name = "TASK=FILE"

    def convert(self, value, param, ctx) -> tuple[str, Path]:
        task, equals, file = value.partition("=")
        if not equals or not Path(file).is_file():
            self.fail(f"{value!r} is not TASK=FILE with a file that exists.", param, ctx)
        return task, Path(file)


def _common(command: Callable) -> Callable:
    """Options of every benchmark."""
    options = (
        click.option("--model", "name", default="smollm2", show_default=True,
                     help="'smollm2' or a converted directory."),
        click.option("--contexts", type=Listed(numbers=True), default="2048,4096", show_default=True,
                     help="In tokens."),
        click.option("--modes", type=Listed(), help=f"Presets.  [default without --mode: {','.join(PRESETS)}]"),
        click.option("--mode", "more", multiple=True,
                     help="A preset with options, such as budget:tolerance=0.02,key_planes=8+4. May be repeated."),
        click.option("--text", "text", default="austen", show_default=True,
                     help="Corpus: 'austen', a .txt file, a directory of them, or hf:NAME[:SUBSET[:SPLIT[:FIELD]]]."),
        click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True,
                     help="Samples decoded together."),
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the samples."),
        kv_dtype_option,
        click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path),
                     help="JSON lines. What is there already is not run again."),
        json_option,
    )  # fmt: skip
    return functools.reduce(lambda f, option: option(f), reversed(options), command)


def _answered(command: Callable) -> Callable:
    """Options of benchmarks that are answered in words."""
    options = (
        click.option("--samples", type=click.IntRange(min=1), default=20, show_default=True,
                     help="Of each task and context."),
        click.option("--chat/--no-chat", default=None, help="Use the chat template.  [default: if the model has one]"),
    )  # fmt: skip
    return functools.reduce(lambda f, option: option(f), reversed(options), command)


@click.group("eval")
def eval_command() -> None:
    """Measure what a mode costs in quality: the same samples, dense and compressed."""


@eval_command.command("ppl")
@click.option("--windows", "per_text", type=click.IntRange(min=1), default=4, show_default=True,
              help="Of each text and context, spread over the text.")  # fmt: skip
@click.option("--tasks", "titles", type=Listed(), help="Titles of texts.  [default: all of the corpus]")
@click.option("--scored", type=click.IntRange(min=1),
              help="Tokens at the end of a window that are decoded and scored.  [default: half of it]")  # fmt: skip
@_common
def ppl_command(per_text, titles, scored, text, contexts, seed, **options) -> None:
    """Perplexity of running text: half of each window is prefilled, the other half decoded."""

    def works(model: Model) -> list[Work]:
        texts = corpus(text)
        if titles is not None:
            if unknown := [title for title in titles if title not in texts]:
                raise InvalidArgumentError(f"--tasks: no text {unknown[0]!r} in {text}; it has {', '.join(texts)}.")
            texts = {title: texts[title] for title in titles}
        return windows(model, texts, contexts, per_text, scored)

    _evaluate(works, seed=seed, **options)


@eval_command.command("niah")
@click.option("--tasks", type=Listed(), default="niah", show_default=True,
              help="'niah': ten needles in one answer; 'niah_each': one at a time.")  # fmt: skip
@_answered
@_common
def niah_command(tasks, **options) -> None:
    """Ten needles in a haystack, at depths from 0 to 0.9."""
    _questions("niah", tasks, {}, **options)


@eval_command.command("ruler")
@click.option("--tasks", type=Listed(), default=",".join(DEFAULT), show_default=True, help="Any of RULER's thirteen.")
@click.option("--questions", type=Named(), multiple=True, help="Questions of qa_1 or qa_2. May be repeated.")
@_answered
@_common
def ruler_command(tasks, questions, **options) -> None:
    """RULER: retrieval, tracing and aggregation in long contexts."""
    _questions("ruler", tasks, dict(questions), **options)


def _questions(
    benchmark: str, names: Sequence[str], files: dict[str, Path], text, contexts, samples, chat, seed, **options
) -> None:
    with clean_errors():
        if unused := sorted(files.keys() - set(names)):
            raise InvalidArgumentError(f"--questions names {unused[0]}, which --tasks does not.")
        makers = [make_task(name, files.get(name)) for name in names]
        of_niah = {"niah", "niah_each"}
        if wrong := [m.name for m in makers if (m.name in of_niah) != (benchmark == "niah")]:
            raise InvalidArgumentError(f"task {wrong[0]} is not of `certjax eval {benchmark}`.")

    def works(model: Model) -> list[Work]:
        source = source_of(model.tokenizer, "\n".join(corpus(text).values()))
        templated = model.tokenizer.has_chat_template if chat is None else chat
        if templated:
            model.tokenizer.chat("")  # refuses a model without a template
        return [
            Questions(benchmark, maker, context, range(samples), seed, source, model.tokenizer,
                      model.config.context_length, templated)
            for context in contexts
            for maker in makers
        ]  # fmt: skip

    _evaluate(works, seed=seed, **options)


def _evaluate(
    works: Callable[[Model], list[Work]], *, name, modes, more, batch, seed, kv_dtype, out: Path, as_json
) -> None:
    use_compilation_cache()
    with clean_errors():
        chosen = _modes(modes, more)
        runner.check_out(out)
        model = load(name, kv_dtype=kv_dtype, progress=not as_json)
        if model.tokenizer is None:
            raise InvalidArgumentError(f"model {name} has no tokenizer.json, so it reads no text; convert it again.")
        found = runner.run(model, works(model), chosen, out, seed=seed, batch=batch, progress=not as_json)
    rows = runner.overview(found)
    if as_json:
        print_json({"out": str(out), "records": len(found), "rows": [_plain(row) for row in rows]})
        return
    wide_console().print(_table(rows))
    click.echo(f"{len(found)} records in {out}. Next: certjax report {out} --out {out.with_suffix('')}-report")


def _modes(modes: Sequence[str] | None, more: Sequence[str]) -> tuple[EvalMode, ...]:
    return parse_modes([*(modes or (() if more else PRESETS)), *more])


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no infinity."""
    return {k: None if v in (float("inf"), float("-inf")) else v for k, v in row.items()}


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("context", "task", "mode"):
        table.add_column(column, no_wrap=column != "mode", min_width=len(column), overflow="fold")
    for column in ("samples", "score", "bound before\nfallback: mean", "\nmax", "dense\nsteps", "s a\nsample"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        quality = f"ppl {row['perplexity']:.4f}" if "perplexity" in row else f"{row['score']:.3f}"
        bounds = [_share(row[key]) for key in ("bound_mean", "bound_max", "dense")]
        table.add_row(str(row["context"]), row["task"], row["mode"], str(row["samples"]), quality, *bounds,
                      f"{row['seconds']:.1f}")  # fmt: skip
    return table


def _share(x: float | None) -> str:
    return "" if x is None else f"{x:.2%}"
