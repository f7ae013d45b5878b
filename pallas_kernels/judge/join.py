"""What the programs of a pass found, added up: values by weight, of tier 1 and of originals. Twin: the sums that
`certjax.fused.bound.judge` and `exact_of` begin with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import levels as lv
from pallas_kernels.device_math import most
from pallas_kernels.judge import record as rc
from pallas_kernels.launch import launch
from pallas_kernels.tile_facts import folded

COUNTS, REDO = tl.constexpr(lv.COUNTS), tl.constexpr(rc.REDO)
N_COARSE, N_VALUES = tl.constexpr(lv.N_COARSE), tl.constexpr(lv.N_VALUES)
N_FINEST, N_PROMOTED = tl.constexpr(lv.N_FINEST), tl.constexpr(lv.N_PROMOTED)
CHANNELS = 16
"""That a program adds up."""

PARTS = tl.constexpr(64)
"""That it loads at once: a second load would wait for the first to arrive."""

FROM_WINDOWS, FROM_ALL, KEY, VALUE = range(4)
"""Rows of the second result: sums of the weights of originals, and the squares of the longest key and value."""


@triton.jit
def _window_scale(peak, HIGHEST: tl.constexpr):
    """Of weights in units of the largest, `2^peak`; not a finite number above HIGHEST, so that the head-step fails."""
    return tl.where(peak <= HIGHEST, tl.exp2(peak), float("inf"))


@triton.jit
def _add(acc, first, flat, some, N: tl.constexpr, AT_ONCE: tl.constexpr, SIZE: tl.constexpr):
    """Of `some` of N parts, rows from `first` on, elements `flat`."""
    total = tl.zeros(flat.shape, tl.float32)
    for start in tl.static_range(0, N, AT_ONCE):
        part = start + tl.arange(0, AT_ONCE)[:, None]
        total += tl.sum(tl.load(acc + (first + part) * SIZE + flat[None], mask=part < some, other=0.0), 0)
    return total


@triton.jit
def _add_originals(
    acc, sums, first, flat, some, N: tl.constexpr, AT_ONCE: tl.constexpr, SIZE: tl.constexpr, C: tl.constexpr,
    HIGHEST: tl.constexpr,
):  # fmt: skip
    """Attention to originals in `some` of N parts, rows from `first` on of `acc` [., d, C] and `sums` [., 4, C]: what
    the weights add up to with values (elements `flat`) and without, in units of e^reference, and the squares of the
    longest key and value."""
    values, col = tl.zeros(flat.shape, tl.float32), tl.arange(0, C)[None]
    total, key, value = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    for start in tl.static_range(0, N, AT_ONCE):
        part = start + tl.arange(0, AT_ONCE)[:, None]
        of, here = sums + (first + part) * (4 * C) + col, part < some
        found = tl.load(of, mask=here, other=0.0)
        scale = _window_scale(tl.load(of + 3 * C, mask=here, other=0.0), HIGHEST)
        keys, longest = tl.load(of + C, mask=here, other=0.0), tl.load(of + 2 * C, mask=here, other=0.0)
        # The same by element of `acc`. A part that read nothing says so by a total of 0, and by nothing else.
        of = sums + (first + part) * (4 * C) + flat[None] % C
        read = here & (tl.load(of, mask=here, other=0.0) != 0)
        scale_flat = _window_scale(tl.load(of + 3 * C, mask=here, other=0.0), HIGHEST)
        products = tl.load(acc + (first + part) * SIZE + flat[None], mask=read, other=0.0)
        values += tl.sum(products * tl.where(read, scale_flat, 0.0), 0)
        total += tl.sum(found * scale, 0)
        key, value = most(key, tl.max(keys, 0)), most(value, tl.max(longest, 0))
    return values, total, key, value


@triton.jit
def _join(
    coarse, fine, window_acc, window_sums, host_acc, host_sums, counts, asked,  # inputs
    joined, exact,  # outputs
    S: tl.constexpr, FINE_S: tl.constexpr, W: tl.constexpr, P: tl.constexpr, P_UP: tl.constexpr, C: tl.constexpr,
    D: tl.constexpr, CHANNELS: tl.constexpr, HIGHEST: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    h, share = tl.program_id(0), tl.program_id(1)
    what = REDO if FIRST else tl.load(asked + h)
    if what == REDO:
        size: tl.constexpr = D * C
        flat, col = share * (CHANNELS * C) + tl.arange(0, CHANNELS * C), tl.arange(0, C)
        of = counts + h * COUNTS
        n_by_scan = tl.load(of + N_COARSE) + tl.load(of + N_VALUES)
        n_finest, n_promoted = tl.load(of + N_FINEST), tl.load(of + N_PROMOTED)
        from_tier1 = tl.zeros((CHANNELS * C,), tl.float32)
        if n_by_scan > 0:  # else nothing was stored
            from_tier1 += _add(coarse, h * S, flat, S, S, PARTS, size)
        if n_finest + n_promoted > 0:
            at_work = tl.minimum(n_finest + n_promoted, FINE_S)  # as in `levels`
            from_tier1 += _add(fine, h * FINE_S, flat, at_work, FINE_S, PARTS, size)
        values, total, key, value = _add_originals(window_acc, window_sums, h * W, flat, W, W, 4, size, C, HIGHEST)
        of_windows = total
        if n_promoted > 0:
            more, more_total, more_key, more_value = _add_originals(
                host_acc, host_sums, h * P, flat, tl.minimum(n_promoted, P), P, P_UP, size, C, HIGHEST
            )
            values, total = values + more, total + more_total
            key, value = most(key, more_key), most(value, more_value)
        channel = share * CHANNELS + tl.arange(0, CHANNELS)
        to = joined + h * 2 * size + channel[:, None] * C + col[None]
        tl.store(to, folded(from_tier1, CHANNELS, C))
        tl.store(to + size, folded(values, CHANNELS, C))
        if share == 0:
            row = exact + h * 4 * C + col
            tl.store(row, of_windows)
            tl.store(row + C, total)
            tl.store(row + 2 * C, key)
            tl.store(row + 3 * C, value)


def join(
    coarse: jax.Array,  # [H, S, d, C], values with the scan's weights
    fine: jax.Array,  # [H, S', d, C]
    windows: tuple[jax.Array, jax.Array],  # [H, W, d, C], [H, W, 4, C]
    promoted: tuple[jax.Array, jax.Array],  # [H, P, d, C], [H, P, 4, C]
    counts: jax.Array,  # [H, COUNTS] int32
    asked: jax.Array | None,  # [H] int32, heads that are not REDO are left out; without, none is
    highest: float,
) -> list[jax.Array]:
    """`[H, 2, d, C]`, of tier 1 and of originals, both halves of the columns added up in each; and `[H, 4, C]`."""
    heads, splits, d, columns = coarse.shape
    from_host, f32 = promoted[0].shape[1], jnp.float32
    return launch(
        _join, coarse, fine, *windows, *promoted, counts, counts if asked is None else asked,
        out=[
            jax.ShapeDtypeStruct((heads, 2, d, columns), f32),
            jax.ShapeDtypeStruct((heads, 4, columns), f32),
        ],
        grid=(heads, d // CHANNELS), S=splits, FINE_S=fine.shape[1], W=windows[0].shape[1], P=from_host,
        P_UP=min(16, triton.next_power_of_2(from_host)), C=columns, D=d, CHANNELS=CHANNELS, HIGHEST=highest,
        FIRST=asked is None,
    )  # fmt: skip
