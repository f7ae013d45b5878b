"""Mosaic GPU's interpreter, which runs a kernel's threads, copies and barriers on a CPU."""

from __future__ import annotations

from typing import Any


def of_mosaic(**options: Any) -> Any | None:
    """What a kernel takes as `interpret`; None where this JAX has no interpreter."""
    try:
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
    except ImportError:
        return None
    return InterpretGPUParams(**options)
