"""Timing on the device: a function inside one compiled loop, so that Python's dispatch is paid once a loop."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax


def per_call(
    f: Callable[..., Any], q: jax.Array, *arguments: Any, calls: int = 20, loops: int = 9,
    options: dict[str, Any] | None = None,
) -> np.ndarray:  # fmt: skip
    """Microseconds a call of `f(q, *arguments)`, one figure a loop of `calls`: sorted. `f` may return a record beside
    its output, which is stored. `options`: of XLA.

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

    jax.block_until_ready(many(q, *arguments))
    figures = []
    for _ in range(loops):
        began = time.perf_counter()
        jax.block_until_ready(many(q, *arguments))
        figures.append((time.perf_counter() - began) * 1e6 / calls)
    return np.sort(figures)


def quantiles(figures: np.ndarray) -> dict[str, float]:
    """p50, p95 and p99 of the figures."""
    return {f"p{q}": round(float(np.percentile(figures, q)), 2) for q in (50, 95, 99)}
