"""What the programs of a pass found, added up: values by weight, of tier 1 and of originals. Twin: the sums that
`certjax.fused.bound.judge` and `exact_of` begin with."""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels import levels as lv
from pallas_kernels.device_math import most
from pallas_kernels.tile_facts import folded

COUNTS = tl.constexpr(lv.COUNTS)
N_COARSE, N_VALUES = tl.constexpr(lv.N_COARSE), tl.constexpr(lv.N_VALUES)
N_FINEST, N_PROMOTED = tl.constexpr(lv.N_FINEST), tl.constexpr(lv.N_PROMOTED)
CHANNELS = 32
"""That a program adds up."""

FROM_WINDOWS, FROM_ALL, KEY, VALUE = (tl.constexpr(i) for i in range(4))
"""Rows of `exact`: sums of the weights of originals, and the squares of the longest key and value."""


@triton.jit
def _window_scale(peak, HIGHEST: tl.constexpr):
    """Of weights in units of the largest, `2^peak`; not a finite number above HIGHEST, so that the head-step fails."""
    return tl.where(peak <= HIGHEST, tl.exp2(peak), float("inf"))


@triton.jit
def _parts(acc, first, flat, some, N: tl.constexpr, SIZE: tl.constexpr):
    """Elements `flat` of `some` of N parts, rows from `first` on: [N or more, .]."""
    part = tl.arange(0, triton.next_power_of_2(N))[:, None]
    return tl.load(acc + (first + part) * SIZE + flat[None], mask=part < some, other=0.0)


@triton.jit
def _sums(sums, first, place, some, N: tl.constexpr, C: tl.constexpr):
    """What `some` of N parts that attended to originals say, at columns `place`: total, longest key, longest value
    (both squared), and the largest score: [N or more, .]."""
    part = tl.arange(0, triton.next_power_of_2(N))[:, None]
    of, here = sums + (first + part) * (4 * C) + place[None], part < some
    return (
        tl.load(of, mask=here, other=0.0), tl.load(of + C, mask=here, other=0.0),
        tl.load(of + 2 * C, mask=here, other=0.0), tl.load(of + 3 * C, mask=here, other=0.0),
    )  # fmt: skip


@triton.jit
def _add_originals(products, by_column, by_element, HIGHEST: tl.constexpr):
    """What the weights add up to with values and without, in units of e^reference, and the squares of the longest key
    and value. `by_column`, `by_element`: of `_sums`."""
    found, keys, longest, peak = by_column
    # A part that read nothing says so by a total of 0, and by nothing else.
    total, _, _, peak_of_element = by_element
    values = tl.where(total != 0, products * _window_scale(peak_of_element, HIGHEST), 0.0)
    return tl.sum(values, 0), tl.sum(found * _window_scale(peak, HIGHEST), 0), tl.max(keys, 0), tl.max(longest, 0)


@triton.jit
def join_channels(
    h, share,  # which CHANNELS of a head
    coarse, fine, window_acc, window_sums, host_acc, host_sums, counts,  # inputs
    joined, exact,  # outputs
    S: tl.constexpr, FINE_S: tl.constexpr, W: tl.constexpr, P: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    CHANNELS: tl.constexpr, HIGHEST: tl.constexpr,
):  # fmt: skip
    """`joined` [H, 2, D, C], of tier 1 and of originals, both halves of the columns added up in each; and `exact`
    [H, 4, C] (by the first)."""
    size: tl.constexpr = D * C
    flat, col = share * (CHANNELS * C) + tl.arange(0, CHANNELS * C), tl.arange(0, C)
    of = counts + h * COUNTS
    n_by_scan = tl.load(of + N_COARSE) + tl.load(of + N_VALUES)
    n_finest, n_promoted = tl.load(of + N_FINEST), tl.load(of + N_PROMOTED)
    # Programs that were not at work (as in `levels`) have stored nothing. Everything is loaded at once.
    by_scan = tl.where(n_by_scan > 0, S, 0)
    refining, reading = tl.minimum(n_finest + n_promoted, FINE_S), tl.minimum(n_promoted, P)
    from_scan = _parts(coarse, h * S, flat, by_scan, S, size)
    from_fine = _parts(fine, h * FINE_S, flat, refining, FINE_S, size)
    in_windows, in_host = _parts(window_acc, h * W, flat, W, W, size), _parts(host_acc, h * P, flat, reading, P, size)
    of_windows, of_host = _sums(window_sums, h * W, col, W, W, C), _sums(host_sums, h * P, col, reading, P, C)
    windows_flat, host_flat = (
        _sums(window_sums, h * W, flat % C, W, W, C), _sums(host_sums, h * P, flat % C, reading, P, C)
    )  # fmt: skip
    from_tier1 = tl.sum(from_scan, 0) + tl.sum(from_fine, 0)
    values, by_windows, key, value = _add_originals(in_windows, of_windows, windows_flat, HIGHEST)
    more, by_host, more_key, more_value = _add_originals(in_host, of_host, host_flat, HIGHEST)
    values, total, key, value = values + more, by_windows + by_host, most(key, more_key), most(value, more_value)
    channel = share * CHANNELS + tl.arange(0, CHANNELS)
    to = joined + h * 2 * size + channel[:, None] * C + col[None]
    tl.store(to, folded(from_tier1, CHANNELS, C))
    tl.store(to + size, folded(values, CHANNELS, C))
    if share == 0:
        row = exact + h * 4 * C + col
        tl.store(row + FROM_WINDOWS * C, by_windows)
        tl.store(row + FROM_ALL * C, total)
        tl.store(row + KEY * C, key)
        tl.store(row + VALUE * C, value)
