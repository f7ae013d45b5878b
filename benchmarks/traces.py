"""What JAX's profiler saw of a call."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def events(f: Callable[..., Any], *arguments: Any) -> list[dict[str, Any]]:
    """Of `f(*arguments)` run to its end, in the form of Chrome's trace viewer; times in microseconds."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(f(*arguments))
        (path,) = Path(folder).glob("**/*.trace.json.gz")
        with gzip.open(path) as file:
            return json.load(file)["traceEvents"]
