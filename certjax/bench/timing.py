"""Timing on the device: a function inside one compiled loop, so that Python's dispatch is paid once a loop."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax

SHORTEST = 20e3
"""Microseconds that a figure is measured for."""


def per_call(
    f: Callable[..., Any], q: jax.Array, *arguments: Any, calls: int = 20, loops: int = 9,
    options: dict[str, Any] | None = None,
) -> np.ndarray:  # fmt: skip
    """Microseconds a call of `f(q, *arguments)` in a loop of `calls`, as `of_loop` has them. `f` may return a record
    beside its output, which is stored. `options`: of XLA.

    Every call depends on the one before. The loop's own overhead, 15 to 20 us an iteration on an H100, is included; it
    is the same for everything measured with this function.
    """

    @functools.partial(jax.jit, compiler_options=options)
    def many(q, *arguments):
        def body(q, _):
            found = f(q, *arguments)
            out, record = found if isinstance(found, tuple) else (found, None)
            return q + out.reshape(q.shape).astype(q.dtype) * 1e-20, record

        return lax.scan(body, q, None, length=calls)

    return of_loop(many, q, *arguments, calls=calls, loops=loops)


def of_loop(many: Callable[..., Any], *arguments: Any, calls: int, loops: int) -> np.ndarray:
    """Microseconds a call, sorted, of `many(*arguments)`, which makes `calls` calls: `loops` figures.

    For each figure it runs so often, one behind the other, that a moment in which the host does something else counts
    for little: at least `SHORTEST` microseconds in all.
    """

    def took(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            found = many(*arguments)
        jax.block_until_ready(found)
        return (time.perf_counter() - began) * 1e6

    took(1)
    times = math.ceil(SHORTEST / took(1))
    return np.sort([took(times) / (times * calls) for _ in range(loops)])


def quantiles(figures: np.ndarray) -> dict[str, float]:
    """p50, p95 and p99 of the figures."""
    return {f"p{q}": round(float(np.percentile(figures, q)), 2) for q in (50, 95, 99)}
