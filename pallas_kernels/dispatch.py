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
    coarse: Callable
    fine: Callable
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
    from pallas_kernels.coarse.reference import attend_coarse
    from pallas_kernels.fine.reference import attend_fine
    from pallas_kernels.originals.reference import attend_originals
    from pallas_kernels.scan.reference import scan_tiles

    dealt = (functools.partial(f, splits=splits) for f in (attend_coarse, attend_fine, attend_originals))
    return Kernels("reference", scan_tiles, *dealt, 2 * splits, splits)


def mosaic_kernels(n_heads: int) -> Kernels:
    """Pallas on Mosaic GPU. `n_heads`: KV heads of all sequences, which share the device's processors."""
    from pallas_kernels.coarse.mosaic import attend_coarse
    from pallas_kernels.fine.mosaic import READERS, attend_fine
    from pallas_kernels.originals.mosaic import attend_originals
    from pallas_kernels.scan.mosaic import scan_tiles

    def dealt(kernel, at_once: int, others: int = 0):
        splits = max(1, min(64, at_once * PROCESSORS // n_heads - others))
        return functools.partial(kernel, splits=splits - splits % 2 or 1)

    second = dealt(attend_coarse, 4), dealt(attend_fine, 2)
    originals = dealt(attend_originals, 2)
    return Kernels(
        "mosaic_gpu", dealt(scan_tiles, 4, WINDOWS), *second, originals,
        splits=sum(x.keywords["splits"] for x in second),
        fewest=min(READERS, *(x.keywords["splits"] for x in (*second, originals))),
        chained=importlib.util.find_spec("triton") is not None,
    )  # fmt: skip
