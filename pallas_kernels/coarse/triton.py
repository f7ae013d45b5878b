"""Second pass of a step in Triton, first part: values of chosen tiles, with the scan's weights.

Twin: `coarse/reference.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import levels as lv
from pallas_kernels.device_tiles import HALF, TILE, add_values, load_values, no_values, store_channels
from pallas_kernels.launch import launch

COUNTS, N_COARSE, N_VALUES = tl.constexpr(lv.COUNTS), tl.constexpr(lv.N_COARSE), tl.constexpr(lv.N_VALUES)
COARSE, VALUES = tl.constexpr(lv.COARSE), tl.constexpr(lv.VALUES)


@triton.jit
def _attend_coarse(
    layer, words, counts, weights, values, values_low,  # inputs
    acc,  # output
    H: tl.constexpr, NT: tl.constexpr, FLAGS: tl.constexpr, C: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    h, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(counts + h * COUNTS + N_COARSE) + tl.load(counts + h * COUNTS + N_VALUES) > 0:
        head = tl.load(layer).to(tl.int64) * H + h
        found = no_values(C, D)
        for tile in tl.range(split, NT, SPLITS, num_stages=2):
            level, row = tl.load(words + h * FLAGS + tile) & 255, head * NT + tile
            if (level == COARSE) | (level == VALUES):
                of = weights + (h * NT + tile) * C * TILE + tl.arange(0, C)[None] * TILE + tl.arange(0, HALF)[:, None]
                w = tl.load(of), tl.load(of + HALF)
                found = add_values(found, load_values(values + row * D * HALF, 1, 4, D), w, 4, 4, D)
                if level == VALUES:
                    lower = load_values(values_low + row * D * (HALF // 2), 1, 2, D)
                    found = add_values(found, lower, w, 2, 1, D)
        store_channels(acc + (h * SPLITS + split) * D * C, found, C, D)


def attend_coarse(layer, words, counts, weights, values, values_low, *, splits: int):
    heads, n_tiles, columns = weights.shape[:3]
    d = values.shape[3]
    return launch(
        _attend_coarse, layer, words, counts, weights, values, values_low,
        out=jax.ShapeDtypeStruct((heads, splits, d, columns), jnp.float32), grid=(heads, splits),
        H=heads, NT=n_tiles, FLAGS=words.shape[1], C=columns, D=d, SPLITS=splits,
    )  # fmt: skip
