"""The output projection of a decode step, begun while it is not certain that what is projected will do. Twin:
`project/reference.py`.

`project` leaves sums over shares of the inputs; `project_again` adds them up, or projects once more where something was
revised meanwhile. Both read a layer's weights where those of all layers lie. The first takes few registers and little
shared memory, so that kernels that find out whether to revise anything run beside it, which cuBLAS's leave no room for.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.device_math import INTERPRETED, rounded
from pallas_kernels.launch import launch

ROWS, INPUTS, OUTPUTS = 16, 128, 64
"""Of a tile: rows of the operand, as the matrix unit takes them, and of and in weights."""

SHARES = 4
"""That the inputs are cut into: as many programs read at once what one would read one after the other."""


@triton.jit
def _tile(BM: tl.constexpr, BN: tl.constexpr):
    """Rows and outputs of a program."""
    return tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)


@triton.jit
def _sum_share(share, x, w, layer, B: tl.constexpr, K: tl.constexpr, N: tl.constexpr, BM: tl.constexpr,
               BK: tl.constexpr, BN: tl.constexpr, SHARE: tl.constexpr):  # fmt: skip
    """Of the products of a share of the inputs: [BM, BN]."""
    row, n = _tile(BM, BN)
    first, at, total = share * SHARE + tl.arange(0, BK), tl.load(layer).to(tl.int64), tl.zeros((BM, BN), tl.float32)
    of_x, of_w = x + row[:, None] * K + first[None], w + (at * K + first)[:, None] * N + n[None]
    for start in range(0, SHARE, BK):
        here = start + first < K
        a = tl.load(of_x + start, mask=(row < B)[:, None] & here[None], other=0.0).to(tl.bfloat16)
        b = tl.load(of_w + start * N, mask=here[:, None] & (n < N)[None], other=0.0)
        if INTERPRETED:  # Triton's interpreter multiplies bfloat16 wrongly
            total += tl.dot(a.to(tl.float32), b.to(tl.float32))
        else:
            total = tl.dot(a, b, total)
    return total


@triton.jit
def _project(
    x, w, layer,  # inputs
    sums,  # outputs
    B: tl.constexpr, K: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    SHARE: tl.constexpr,
):  # fmt: skip
    share = tl.program_id(2)
    row, n = _tile(BM, BN)
    total = _sum_share(share, x, w, layer, B, K, N, BM, BK, BN, SHARE)
    tl.store(sums + (share * B + row[:, None]) * N + n[None], total, mask=(row < B)[:, None] & (n < N)[None])


@triton.jit
def _project_again(
    sums, x, w, bias, layer, revised,  # inputs
    y,  # outputs
    B: tl.constexpr, K: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    SHARE: tl.constexpr, SHARES: tl.constexpr, BIASED: tl.constexpr, H: tl.constexpr, H_UP: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, H_UP)
    row, n = _tile(BM, BN)
    here, total = (row < B)[:, None] & (n < N)[None], tl.zeros((BM, BN), tl.float32)
    if tl.sum(tl.load(revised + head, mask=head < H, other=0), 0) > 0:
        for share in range(SHARES):
            total += _sum_share(share, x, w, layer, B, K, N, BM, BK, BN, SHARE)
    else:
        for part in tl.static_range(SHARES):
            total += tl.load(sums + (part * B + row[:, None]) * N + n[None], mask=here, other=0.0)
    if BIASED:
        at = tl.load(layer).to(tl.int64)
        total = rounded(total) + tl.load(bias + at * N + n, mask=n < N, other=0.0).to(tl.float32)[None]
    tl.store(y + row[:, None] * N + n[None], total.to(tl.bfloat16), mask=here)


def project(
    x: jax.Array,  # [b, n] float32
    w: jax.Array,  # [L, n, D] bfloat16
    layer: jax.Array,  # [] int32
) -> jax.Array:
    """What `x`, in bfloat16, times `w` at `layer` is the sum of: `[S, b, D]` float32."""
    (outputs, rows), constants = _tiles(x, w)
    sums = jax.ShapeDtypeStruct((SHARES, x.shape[0], w.shape[2]), jnp.float32)
    return launch(_project, x, w, layer[None], out=sums, grid=(outputs, rows, SHARES), **constants)


def project_again(
    sums: jax.Array,  # [S, b, D] float32, `project` of `x` as it was
    x: jax.Array,  # [b, n] float32
    w: jax.Array,  # [L, n, D] bfloat16
    bias: jax.Array | None,  # [L, D] bfloat16
    layer: jax.Array,  # [] int32
    revised: jax.Array,  # [H] int32, whose part of `x` is another
) -> jax.Array:
    """`x` times `w` at `layer` (+ `bias`): `[b, D]` bfloat16."""
    (heads,), (grid, constants) = revised.shape, _tiles(x, w)
    return launch(
        _project_again, sums, x, w, w if bias is None else bias, layer[None], revised,
        out=jax.ShapeDtypeStruct(sums.shape[1:], jnp.bfloat16), grid=grid, BIASED=bias is not None, H=heads,
        H_UP=triton.next_power_of_2(heads), SHARES=SHARES, **constants,
    )  # fmt: skip


def _tiles(x: jax.Array, w: jax.Array):
    (batch, k), n = x.shape, w.shape[2]
    grid, share = (triton.cdiv(n, OUTPUTS), triton.cdiv(batch, ROWS)), triton.cdiv(k, SHARES * INPUTS) * INPUTS
    return grid, dict(B=batch, K=k, N=n, BM=ROWS, BK=INPUTS, BN=OUTPUTS, SHARE=share)
