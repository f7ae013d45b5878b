"""Tasks by name: RULER's thirteen, and ten needles in a book."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

from certjax.errors import InvalidArgumentError
from certjax.eval.tasks.base import Task
from certjax.eval.tasks.cwe import CommonWords
from certjax.eval.tasks.fwe import FrequentWords
from certjax.eval.tasks.niah import AllNeedles, EachNeedle
from certjax.eval.tasks.qa import FILES, Qa
from certjax.eval.tasks.ruler_niah import VARIANTS, RulerNiah
from certjax.eval.tasks.vt import VariableTracking

DEFAULT = ("niah_single_2", "niah_multikey_1", "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe")
"""The seven of RULER's tasks that are run unless others are named."""

ALIASES = {"niah_single": "niah_single_2", "niah_multikey": "niah_multikey_1"}

TASKS: dict[str, Callable[[], Task]] = {
    **{name: functools.partial(RulerNiah, name, **options) for name, options in VARIANTS.items()},
    "vt": VariableTracking,
    "cwe": CommonWords,
    "fwe": FrequentWords,
    "niah": AllNeedles,
    "niah_each": EachNeedle,
}
"""Tasks that need no file."""

FROM_FILE = {"qa_1": "squad", "qa_2": "hotpotqa"}
"""Tasks whose questions come from a file of the user's, and its format."""


def make_task(name: str, path: str | os.PathLike | None = None) -> Task:
    """The task of that name, or of that alias.

    Parameters
    ----------
    name
        One of TASKS, FROM_FILE or ALIASES.
    path
        The questions of a task of FROM_FILE.

    Raises
    ------
    InvalidArgumentError
        If there is no such task, a file is needed and missing, or given and not needed.
    """
    name = ALIASES.get(name, name)
    if name in FROM_FILE:
        dataset = FROM_FILE[name]
        if path is None:
            raise InvalidArgumentError(
                f"task {name!r} takes its questions from a file: download {FILES[dataset]} and pass its path."
            )
        return Qa(name, Path(path), dataset)
    if name not in TASKS:
        raise InvalidArgumentError(f"unknown task {name!r}; choose from {', '.join([*TASKS, *FROM_FILE, *ALIASES])}.")
    if path is not None:
        raise InvalidArgumentError(f"task {name!r} takes no file of questions; leave the path out.")
    return TASKS[name]()
