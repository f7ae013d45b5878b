"""Which back end runs the kernels of a step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The kernels of a fused step."""

    name: str
    scan: Callable
    coarse: Callable
    fine: Callable  # with all programs, for what reads all of tier 1 at its finest
    fine_again: Callable  # with fewer programs, where most often there is nothing to do
    originals: Callable
    splits: int  # most parts that sums over a head's tiles come in
    fewest: int  # programs that a head's tiles are dealt out to, and least
    fewest_dense: int  # the same of `originals`
    chained: bool = False  # what is between them runs in Triton kernels, see `certjax.fused.chain`
    scan_and_fine: Callable | None = None  # both in one
    uneven: int = 0  # tiles that a program of that may read beyond an even share

    def by_plan(self, layer, meta, words, counts, summary, q, tier1, live, windows, host):
        """All that a plan asks for: what `scan` returns, and `fine_again`. `tier1`, `host`: as `fine` takes them."""
        keys, keys_low, *rest = tier1
        operands = layer, meta, words, q, keys, *rest, live, windows
        if self.scan_and_fine is not None:
            return self.scan_and_fine(*operands, fine=(counts, summary, keys_low, *host))
        return self.scan(*operands), self.fine_again(layer, words, counts, summary, q, *tier1, *host)


PROCESSORS = 132
"""Of an H100. How many programs of a kernel run on one at once is a matter of registers and shared memory."""

WINDOWS = 3
"""Tiles of the windows, at the default sizes, each of which has a program of its own in the scan."""

READERS, FEW_READERS, FEW_REFINERS = 32, 8, 12
"""Programs of a head that may read from the host: many, so that few pieces share one; or few, by the plan of the step
before and in a second pass; and of those that read tiles at their finest there."""


def reference_kernels(splits: int = 4) -> Kernels:
    """The `jnp` twins: every device, for tests."""
    from pallas_kernels.coarse.reference import attend_coarse
    from pallas_kernels.fine.reference import attend_fine
    from pallas_kernels.originals.reference import attend_originals
    from pallas_kernels.scan.reference import scan_tiles

    kernels = scan_tiles, attend_coarse, attend_fine, attend_fine, attend_originals
    return Kernels(
        "reference", *(functools.partial(f, splits=splits) for f in kernels), splits=2 * splits, fewest=splits,
        fewest_dense=splits,
    )  # fmt: skip


def mosaic_kernels(n_heads: int) -> Kernels:
    """Pallas on Mosaic GPU, and for a second pass Triton. `n_heads`: KV heads of all sequences, which share the
    device's processors."""
    from pallas_kernels.fine.mosaic import attend_fine
    from pallas_kernels.scan.dealing import MOST_AHEAD
    from pallas_kernels.scan.mosaic import scan_and_fine, scan_tiles

    scan, two = _programs(n_heads, 2.97, PROCESSORS, WINDOWS), _programs(n_heads, 2, PROCESSORS)
    return _with_second_pass(
        "mosaic_gpu", scan, two,
        scan=functools.partial(scan_tiles, splits=scan),
        fine=functools.partial(attend_fine, splits=two, readers=READERS),
        scan_and_fine=functools.partial(
            scan_and_fine, splits=scan, refiners=min(two, FEW_REFINERS), readers=FEW_READERS
        ),
        uneven=MOST_AHEAD,
    )  # fmt: skip


def triton_kernels(n_heads: int, processors: int = PROCESSORS, shared: int = 228) -> Kernels:
    """Triton, for GPUs whose matrix units Mosaic's kernels do not know. `processors`, and the KB of memory that the
    programs of one share: of the device."""
    from pallas_kernels.fine.triton import attend_fine
    from pallas_kernels.scan.triton import scan_tiles

    # Three have room by their registers. On an H100 three that fetch values ahead take 0.92 of the time of three that
    # do not, and those 0.91 of that of two that do.
    ahead = shared >= 3 * 62
    scan = _programs(n_heads, 3 if shared >= 3 * 38 else 2, processors, WINDOWS)
    two = _programs(n_heads, 2, processors)
    return _with_second_pass(
        "triton", scan, two,
        scan=functools.partial(scan_tiles, splits=scan, ahead=ahead),
        fine=functools.partial(attend_fine, splits=two, readers=READERS),
    )  # fmt: skip


def _with_second_pass(name: str, of_scan: int, two: int, **first_pass) -> Kernels:
    """And with dense heads, both in Triton, which is as fast there as Mosaic and returns sooner where there is nothing
    to do, as is the rule.

    `of_scan`, `two`: programs of a head in the scan, and where two run on a processor at once. Those that find nothing
    to do return one after the other, so that few refine.
    """
    from pallas_kernels.coarse.triton import attend_coarse
    from pallas_kernels.fine.triton import attend_fine
    from pallas_kernels.originals.triton import attend_originals

    few = min(two, FEW_REFINERS)
    return Kernels(
        name,
        coarse=functools.partial(attend_coarse, splits=two),
        fine_again=functools.partial(attend_fine, splits=few, readers=FEW_READERS),
        originals=functools.partial(attend_originals, splits=two),
        splits=max(of_scan, two) + two,
        fewest=min(of_scan, few),
        fewest_dense=two,
        chained=True,
        **first_pass,
    )


def _programs(n_heads: int, at_once: float, processors: int, others: int = 0) -> int:
    """Of a head, where so many run on a processor at once."""
    return max(1, min(64, int(at_once * processors) // n_heads - others))
