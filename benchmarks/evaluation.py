"""The commands of an evaluation in one process, so that models and programs are loaded once:
`python -m benchmarks.evaluation PLAN`.

A plan has one `certjax` command a line, most important first; `#` begins a comment. A command that fails is tried again
mode by mode: what one mode cannot do costs no other its records. Stopped and started again, it goes on where it was.
"""

from __future__ import annotations

import functools
import shlex
import sys
import time
import traceback
from pathlib import Path

import certjax.cli.eval
from certjax.cli import main as certjax_command


def main(plan: str) -> None:
    certjax.cli.eval.load = functools.cache(certjax.cli.eval.load)
    for line in Path(plan).read_text().splitlines():
        arguments = shlex.split(line, comments=True)
        if arguments and not done(arguments):
            for alone in by_mode(arguments):
                done(alone)


def done(arguments: list[str]) -> bool:
    began = time.perf_counter()
    say(f"certjax {shlex.join(arguments)}")
    try:
        certjax_command([*arguments, "--json"], standalone_mode=False)
    except Exception as error:
        traceback.print_exc()
        say(f"failed: {type(error).__name__}: {str(error)[:300]}")
        return False
    say(f"{time.perf_counter() - began:.1f} s")
    return True


def by_mode(arguments: list[str]) -> list[list[str]]:
    """The command once for each of its modes."""
    rest, modes, words = [], [], iter(arguments)
    for word in words:
        if word == "--modes":
            modes += next(words).split(",")
        elif word == "--mode":
            modes.append(next(words))
        else:
            rest.append(word)
    return [[*rest, "--mode", mode] for mode in modes]


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
