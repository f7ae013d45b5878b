"""`certjax convert`: a Hugging Face directory or a GGUF file to a directory that `certjax.load` reads."""

from __future__ import annotations

import json
from pathlib import Path

import click

import checkpoints_tools
from certjax.cli.common import clean_errors, json_option, print_json


@click.command("convert")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16", "source"]), default="float32", show_default=True
)
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT if it exists.")
@json_option
def convert_command(source: Path, output: Path, dtype: str, overwrite: bool, as_json: bool) -> None:
    """Convert SOURCE (safetensors directory or .gguf file) to the Orbax directory OUTPUT."""
    with clean_errors():
        try:
            written = checkpoints_tools.convert(source, output, dtype=dtype, overwrite=overwrite, progress=not as_json)
        except checkpoints_tools.OutputExistsError as error:  # says how to replace it from Python
            raise click.ClickException(str(error).replace("overwrite=True", "--overwrite")) from error
    manifest = json.loads((written / "manifest.json").read_text())
    if as_json:
        print_json({"output": str(written), "manifest": manifest})
    else:
        click.echo(f"wrote {written}: {len(manifest['leaves'])} arrays, {dtype}")
