"""What the subcommands share: errors as one line, JSON on stdout, a compilation cache."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import click
import jax
from rich.console import Console

import checkpoints_tools
from certjax.cache import ORIGINAL_DTYPES
from certjax.errors import CertjaxError
from certjax.model import cache_directory

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else on stdout.")

kv_dtype_option = click.option(
    "--kv-dtype", type=click.Choice(ORIGINAL_DTYPES),
    help="Of the cached originals; kernels on a GPU read bfloat16.  [default: the model's]",
)  # fmt: skip


@contextlib.contextmanager
def clean_errors():
    """Turn the library's errors into a message and exit status 1, without a traceback."""
    try:
        yield
    except (CertjaxError, checkpoints_tools.CheckpointError) as error:
        raise click.ClickException(str(error)) from error


def print_json(payload: dict[str, Any]) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(payload, indent=2))


def wide_console() -> Console:
    """For tables: whoever reads a file or a pipe has more room than a terminal of 80 columns."""
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)


def use_compilation_cache() -> None:
    """Keep compiled programs between runs of the command."""
    jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
