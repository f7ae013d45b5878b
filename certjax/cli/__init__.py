"""The `certjax` command. One file a subcommand; every subcommand has `--json`."""

from __future__ import annotations

import click

from certjax.cli.audit import audit_command
from certjax.cli.bench import bench_command
from certjax.cli.convert import convert_command
from certjax.cli.eval import eval_command
from certjax.cli.generate import generate_command
from certjax.cli.report import report_command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="certjax")
def main() -> None:
    """Decode with a compressed KV cache and a certificate for every head of every step."""


main.add_command(generate_command)
main.add_command(convert_command)
main.add_command(audit_command)
main.add_command(bench_command)
main.add_command(eval_command)
main.add_command(report_command)
