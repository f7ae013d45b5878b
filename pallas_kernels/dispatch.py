"""Which back end runs the kernels of a step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The kernels of a fused step, and into how many programs the tiles of a head are dealt."""

    name: str
    scan: Callable
    attend: Callable
    originals: Callable
    splits: int


def reference_kernels(splits: int = 4) -> Kernels:
    """The `jnp` twins: every device, for tests."""
    from pallas_kernels.attend import tiles as attend
    from pallas_kernels.originals import reference as originals
    from pallas_kernels.scan import reference as scan

    return _bound("reference", scan, attend, originals, splits)


def mosaic_kernels(n_heads: int) -> Kernels:
    """Pallas on Mosaic GPU. `n_heads`: KV heads of all sequences, which share the device's processors."""
    from pallas_kernels.attend import mosaic as attend
    from pallas_kernels.originals import mosaic as originals
    from pallas_kernels.scan import mosaic as scan

    splits = max(1, min(32, 256 // n_heads))
    return _bound("mosaic_gpu", scan, attend, originals, splits)


def _bound(name: str, scan, attend, originals, splits: int) -> Kernels:
    functions = (scan.scan_tiles, attend.attend_tiles, originals.attend_originals)
    return Kernels(name, *(functools.partial(f, splits=splits) for f in functions), splits)
