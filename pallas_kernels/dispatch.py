"""Which back end runs the kernels of a step."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The kernels of a fused step."""

    name: str
    scan: Callable
    attend: Callable
    originals: Callable
    splits: int  # most parts that sums over a head's tiles come in
    fewest: int  # and least, of those that originals are dealt out to
    chained: bool = False  # what is between them runs in Triton kernels, see `certjax.fused.chain`


PROCESSORS = 132
"""Of an H100. How many programs of a kernel run on one at once is a matter of registers and shared memory."""

WINDOWS = 3
"""Tiles of the windows, at the default sizes, each of which has a program of its own in the scan."""


def reference_kernels(splits: int = 4) -> Kernels:
    """The `jnp` twins: every device, for tests."""
    from pallas_kernels.attend.tiles import attend_tiles
    from pallas_kernels.originals.reference import attend_originals
    from pallas_kernels.scan.reference import scan_tiles

    dealt = (functools.partial(f, splits=splits) for f in (attend_tiles, attend_originals))
    return Kernels("reference", scan_tiles, *dealt, splits, splits)


def mosaic_kernels(n_heads: int) -> Kernels:
    """Pallas on Mosaic GPU. `n_heads`: KV heads of all sequences, which share the device's processors."""
    from pallas_kernels.attend.mosaic import READERS, attend_tiles
    from pallas_kernels.originals.mosaic import attend_originals
    from pallas_kernels.scan.mosaic import scan_tiles

    def dealt(kernel, at_once: int, others: int = 0):
        splits = max(1, min(64, at_once * PROCESSORS // n_heads - others))
        return functools.partial(kernel, splits=splits - splits % 2 or 1)

    attend, originals = dealt(attend_tiles, 2), dealt(attend_originals, 2)
    return Kernels(
        "mosaic_gpu", dealt(scan_tiles, 4, WINDOWS), attend, originals,
        splits=attend.keywords["splits"], fewest=min(READERS, originals.keywords["splits"]),
        chained=importlib.util.find_spec("triton") is not None,
    )  # fmt: skip
