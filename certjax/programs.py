"""How programs whose attention is in kernels are compiled."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax

from certjax.fused.dispatch import COMPILED, pick_backend

OPTIONS = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_dot_merger_threshold_mb": 0,
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE",
}
"""Options of XLA. Weights stay in place: a layer's are a slice of all layers', which cuBLAS reads where they lie, while
what XLA makes of Triton wants them copied first, as do products that it joins. And the device keeps going by itself:
loops and conditionals are part of what it is given to do, and kernels that do not need each other run at once
(docs/kernels.md). Attention that XLA compiles is better off without the first, and is left alone."""


@functools.cache
def accepted() -> dict[str, Any]:
    """Those of `OPTIONS` that this XLA knows."""

    def known(name: str) -> bool:
        try:
            jax.jit(lambda x: x).lower(0.0).compile(compiler_options={name: OPTIONS[name]})
        except jax.errors.JaxRuntimeError as error:
            if "option" not in str(error):  # "No such compile option", "While setting option ..."
                raise
            return False
        return True

    return {name: value for name, value in OPTIONS.items() if known(name)}


def jitted(f: Callable, **options: Any) -> Callable:
    """`jax.jit(f, **options)`, compiled as suits the back end. `f` has arguments `config`, `mode`, `policy`, and a
    `cache` or a `state` that holds one. What is returned has `program(*arguments)`, the jitted function it calls."""
    signature = inspect.signature(f)
    plain = jax.jit(f, **options)

    @functools.cache
    def of_kernels() -> Callable:
        return jax.jit(f, **options, compiler_options=accepted())

    def program(*arguments: Any) -> Callable:
        of = signature.bind(*arguments).arguments
        cache = of["state"].cache if "state" in of else of["cache"]
        in_kernels = of["mode"] != "dense" and pick_backend(of["policy"], cache, of["config"].n_heads) in COMPILED
        return of_kernels() if in_kernels else plain

    @functools.wraps(f)
    def call(*arguments: Any) -> Any:
        return program(*arguments)(*arguments)

    call.program = program
    return call
