"""Dense heads: attention over all their originals, and what comes of it in place of the candidate's. Twin:
`certjax.fused.bound.judge_dense`.

A head's programs read its originals, and the last of them to be done puts together what they found. A kernel of its own
for that would wait for this one to be over, at every step, whether or not a head is dense.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import numerics as num
from pallas_kernels import query as qr
from pallas_kernels.device_math import MAX_DELTA, exp_up, expm1_up, is_last, least, most, no_nan
from pallas_kernels.judge import record as rc
from pallas_kernels.judge.record import OF_DENSE, RETURNED_BOUND, RETURNED_NORM, ROWS, Rounding, length
from pallas_kernels.launch import launch
from pallas_kernels.originals.triton import attend_head
from pallas_kernels.tile_facts import SLACK, folded

REDO = tl.constexpr(rc.REDO)
U, UNDERFLOW, FLOOR = tl.constexpr(num.U), tl.constexpr(num.UNDERFLOW), tl.constexpr(num.ABSOLUTE_FLOOR)


@triton.jit
def _finish(
    h,
    acc, sums, facts,  # inputs
    out, record,  # outputs
    S: tl.constexpr, S_UP: tl.constexpr, AT_ONCE: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr,
    D: tl.constexpr, ROOT: tl.constexpr, VANISHED: tl.constexpr, SPLIT: tl.constexpr, DEPTH_GAMMA: tl.constexpr,
    READS: tl.constexpr, EXP_RELATIVE_ERROR: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Output, its norm and its bound."""
    col, channel = tl.arange(0, C), tl.arange(0, D)
    part, all_parts = tl.arange(0, AT_ONCE)[:, None], tl.arange(0, S_UP)[:, None]
    of = sums + (h * S + all_parts) * (4 * C) + col[None]
    here = all_parts < S
    peaks = tl.load(of + 3 * C, mask=here, other=-1e30)
    peak = tl.max(peaks, 0)
    total = tl.sum(tl.load(of, mask=here, other=0.0) * tl.exp2(peaks - peak[None]), 0)
    key = tl.max(tl.load(of + C, mask=here, other=0.0), 0)
    value = tl.max(tl.load(of + 2 * C, mask=here, other=0.0), 0)
    flat, exact = tl.arange(0, D * C)[None], tl.zeros((D * C,), tl.float32)
    of_flat = sums + h * S * 4 * C + flat % C
    peak_flat = tl.full((1, D * C), -1e30, tl.float32)
    for start in tl.static_range(0, S, AT_ONCE):
        at = start + part
        peaks_flat = tl.load(of_flat + at * (4 * C) + 3 * C, mask=at < S, other=-1e30)
        peak_flat = most(peak_flat, tl.max(peaks_flat, 0)[None])
    for start in tl.static_range(0, S, AT_ONCE):
        at = start + part
        scale = tl.exp2(tl.load(of_flat + at * (4 * C) + 3 * C, mask=at < S, other=-1e30) - peak_flat)
        exact += tl.sum(tl.load(acc + (h * S + at) * (D * C) + flat, mask=at < S, other=0.0) * scale, 0)
    exact = folded(exact, D, C)
    key, value = length(key, ROOT, VANISHED), length(value, ROOT, VANISHED)
    of = facts + h * 4 * C + col
    eps = 32 * U * (tl.load(of) * key) + EXP_RELATIVE_ERROR + READS * 2.0**-21
    eps += tl.load(of + 2 * C) * key * SLACK
    result = exact / total[None]
    accumulated = (SPLIT + 3 * DEPTH_GAMMA) * value
    norm = length(tl.sum(result * result, 0), ROOT, VANISHED)
    radius = value + norm + accumulated
    grow = exp_up(least(eps, MAX_DELTA))
    error = (grow * expm1_up(eps) + N * UNDERFLOW / total * grow * grow) * radius + accumulated
    error = least(tl.where(eps < MAX_DELTA, no_nan(error), float("inf")), no_nan(value + norm))
    error = error * (1 + 2.0**-12) + FLOOR
    tl.store(out + (h * GROUP + col[None]) * D + channel[:, None], result, mask=(col < GROUP)[None])
    of = record + h * ROWS * C + col
    tl.store(of + RETURNED_NORM * C, norm)
    tl.store(of + RETURNED_BOUND * C, error)


@triton.jit
def _go_dense(
    layer, meta, dense, asked, wide, numbers, keys, values, facts, out_before, record_before, before,  # inputs
    acc, sums, out, record, arrived, revised,  # outputs
    H: tl.constexpr, CAPACITY: tl.constexpr, S: tl.constexpr, S_UP: tl.constexpr, AT_ONCE: tl.constexpr,
    GROUP: tl.constexpr, C: tl.constexpr, D: tl.constexpr, ROOT: tl.constexpr, VANISHED: tl.constexpr,
    SPLIT: tl.constexpr, DEPTH_GAMMA: tl.constexpr, READS: tl.constexpr, EXP_RELATIVE_ERROR: tl.constexpr,
):  # fmt: skip
    h, split = tl.program_id(0), tl.program_id(1)
    goes = tl.load(dense + h) > 0
    if split == 0:
        tl.store(revised + h, (goes | (tl.load(asked + h) == REDO)).to(tl.int32))
    if goes:
        attend_head(h, split, layer, meta, wide, numbers, keys, values, acc, sums, H, CAPACITY, C, D, S, True)
        if is_last(arrived + OF_DENSE * H + h, S):
            _finish(
                h, acc, sums, facts, out, record, S, S_UP, AT_ONCE, GROUP, C, D, ROOT, VANISHED, SPLIT, DEPTH_GAMMA,
                READS, EXP_RELATIVE_ERROR, CAPACITY,
            )  # fmt: skip


def go_dense(
    layer: jax.Array,  # [1] int32
    meta: jax.Array,  # [H, 3] int32
    dense: jax.Array,  # [H] int32, a verdict: who is
    asked: jax.Array,  # [H] int32, of whom a second pass was
    q: qr.Operands,
    originals: tuple[jax.Array, jax.Array],  # [L, H, N, d] bfloat16
    facts: jax.Array,  # [H, 4, C]
    out: jax.Array,  # [H, group, d]
    record: jax.Array,  # [H, ROWS, C]
    arrived: jax.Array,  # of `prepare_queries`
    rounding: Rounding,
    *,
    splits: int,
    reads: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`out` and `record`, where a head is dense of that; and whether its output is another than was judged first, by a
    second pass or this, `[H]` int32. `splits`: programs of a head; `reads`: halves of tiles that one reads at most."""
    heads, n, d = originals[0].shape[1:]
    columns, changed = q.parts.shape[2], [out, record, arrived]
    inputs = [layer, meta, dense, asked, q.wide, q.numbers, *originals, facts, *changed]
    f32 = jnp.float32
    outputs = [
        *[jax.ShapeDtypeStruct((heads, splits, rows, columns), f32) for rows in (d, 4)],
        *[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*changed, asked)],
    ]
    *_, out, record, _, revised = launch(
        _go_dense, *inputs, out=outputs, in_place={len(inputs) - 3 + i: 2 + i for i in range(3)}, grid=(heads, splits),
        H=heads, CAPACITY=n, S=splits, S_UP=triton.next_power_of_2(splits),
        AT_ONCE=min(8, triton.next_power_of_2(splits)), GROUP=out.shape[1], C=columns, D=d, ROOT=d**0.5,
        VANISHED=rounding.vanished, SPLIT=rounding.split, DEPTH_GAMMA=rounding.depth_gamma, READS=reads,
        EXP_RELATIVE_ERROR=num.EXP_RELATIVE_ERROR,
    )  # fmt: skip
    return out, record, revised
