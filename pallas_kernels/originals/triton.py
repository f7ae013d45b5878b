"""Attention over all originals of chosen heads in Triton, read from host memory where they are.

Twin: `originals/reference.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.device_tiles import HALF, attend_tile_of_originals, exact_queries, nothing, store_found
from pallas_kernels.launch import launch


@triton.jit
def attend_head(
    h, split, layer, meta, wide, numbers, keys, values,  # inputs
    acc, sums,  # outputs
    H: tl.constexpr, N: tl.constexpr, C: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """What program `split` of SPLITS does for a head: attend to its share of all tokens."""
    head, length = tl.load(layer).to(tl.int64) * H + h, tl.load(meta + 3 * h + 2)
    q, unit, shift = exact_queries(wide, numbers, h, C, D)
    if ALONE:
        shift = tl.zeros_like(shift)
    found, token = nothing(C, D), tl.arange(0, HALF)
    for start in tl.range(split * HALF, tl.minimum(length, N), SPLITS * HALF, num_stages=2):
        of = (head * N + start) * D + token[:, None] * D + tl.arange(0, D)[None]
        k, v = tl.load(keys + of), tl.load(values + of)
        found = attend_tile_of_originals(k, v, start + token < length, q, unit, shift, found, C)
    row = h * SPLITS + split
    store_found(found, acc + row * D * C, sums + row * 4 * C, C, D)


@triton.jit
def _attend_originals(
    layer, meta, chosen, wide, numbers, keys, values,  # inputs
    acc, sums,  # outputs
    H: tl.constexpr, N: tl.constexpr, C: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    h, split = tl.program_id(0), tl.program_id(1)
    if tl.load(chosen + h) > 0:
        attend_head(h, split, layer, meta, wide, numbers, keys, values, acc, sums, H, N, C, D, SPLITS, ALONE)


def attend_originals(layer, meta, chosen, q, keys, values, *, splits: int, alone: bool = False):
    heads, n, d = keys.shape[1:]
    columns = q.parts.shape[2]
    return launch(
        _attend_originals, layer, meta, chosen, q.wide, q.numbers, keys, values,
        out=[jax.ShapeDtypeStruct((heads, splits, rows, columns), jnp.float32) for rows in (d, 4)],
        grid=(heads, splits), H=heads, N=n, C=columns, D=d, SPLITS=splits, ALONE=alone,
    )  # fmt: skip
