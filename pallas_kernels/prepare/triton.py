"""Queries made ready for a step's kernels, and the token stored that they are of. Twins:
`certjax.fused.operands.prepare`, `TieredKVCache.write`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from pallas_kernels import numerics as num
from pallas_kernels import query as qr
from pallas_kernels.append.triton import Append, append_token
from pallas_kernels.device_math import exponent_above, most, nearest, power_of_two, product, rounded
from pallas_kernels.judge import record as rc
from pallas_kernels.launch import launch

ROWS = tl.constexpr(16)
"""Of a matrix operand, of which C are kept."""

NORM_SLACK, BITS, LOG2_E = tl.constexpr(num.NORM_SLACK), tl.constexpr(qr.BITS), tl.constexpr(qr.LOG2_E)
U, EXP_RELATIVE_ERROR = tl.constexpr(num.U), tl.constexpr(num.EXP_RELATIVE_ERROR)
PRODUCTS, ARRIVALS = tl.constexpr(num.PRODUCTS), tl.constexpr(rc.ARRIVALS)


@triton.jit
def _fixed_point(x, largest):
    """As `query.fixed_point`: three bytes, and the scale."""
    k = exponent_above(most(largest, 2.0**-88)) - BITS
    steps = nearest(x * power_of_two(-k)[:, None]).to(tl.int32)
    high = (steps + 32896) >> 16
    rest = steps - 65536 * high
    middle = (rest + 128) >> 8
    return high, middle, rest - 256 * middle, power_of_two(k)


@triton.jit
def _row(source, row, N: tl.constexpr):
    i = tl.arange(0, triton.next_power_of_2(N))
    return tl.load(source + row * N + i, mask=i < N, other=0)


@triton.jit
def _store_row(target, row, x, N: tl.constexpr):
    i = tl.arange(0, triton.next_power_of_2(N))
    tl.store(target + row * N + i, x, mask=i < N)


@triton.jit
def _prepare(
    q, key_centre, largest_of_head, turn, layer, all_words, all_counts, all_summary,  # inputs
    parts, wide, numbers, facts, words, counts, summary, arrived,  # outputs
    H: tl.constexpr, GROUP: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ROOT: tl.constexpr,
    VANISHED: tl.constexpr, ROOM: tl.constexpr, TENSOR_UNIT: tl.constexpr, GAMMA: tl.constexpr,
    FLAGS: tl.constexpr, BLOCKS: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    h, at = tl.program_id(0), tl.load(layer)
    row, channel = tl.arange(0, ROWS), tl.arange(0, D)
    g = row % G
    x = tl.load(q + (h * GROUP + g[:, None]) * D + channel[None], mask=g[:, None] < GROUP, other=0.0)
    # Everything is loaded first: a load that comes after a sum over several warps waits for it.
    centre = tl.load(key_centre + (at * H + h) * D + channel)
    signs = tl.load(turn + channel[:, None] * D + channel[None]).to(tl.float32)  # of R^T
    of_head = largest_of_head + at * 6 * H + h
    reach, reach_closed, centre_norm = tl.load(of_head), tl.load(of_head + 3 * H), tl.load(of_head + 4 * H)
    of_plan = at * H + h
    its_words, its_counts, its_summary = (
        _row(all_words, of_plan, FLAGS), _row(all_counts, of_plan, COUNTS), _row(all_summary, of_plan, BLOCKS)
    )  # fmt: skip
    largest = tl.max(tl.abs(x), 1)
    length = tl.sqrt(tl.sum(x * x, 1)) * NORM_SLACK + ROOT * VANISHED
    along = tl.sum(x * centre[None], 1)

    # The rotation: elements cut at a multiple of a power of two; sums of the upper parts are exact.
    k = exponent_above(most(largest, VANISHED)) - 15
    step = power_of_two(k)[:, None]
    scaled = x * power_of_two(-k)[:, None]
    upper = nearest(scaled)
    lower = scaled - upper
    top = nearest(upper * (1 / 256))
    low = rounded(lower)
    exact = product(top, signs) * 256 + product(upper - 256 * top, signs)
    small = product(low, signs) + product(rounded(lower - low), signs)
    turned = (exact * step + small * step) * (1 / ROOT)

    largest_turned = tl.max(tl.abs(turned), 1)
    per_log = LOG2_E / ROOT
    total = tl.sum(turned, 1) * per_log
    t0, t1, t2, scale = _fixed_point(turned, largest_turned)
    p0, p1, p2, scale_plain = _fixed_point(x, largest)
    columns = row[:, None] < 2 * G
    to = (h * 6 * G + row[:, None]) * D + channel[None]
    tl.store(parts + to, t0.to(tl.int8), mask=columns)
    tl.store(parts + to + 2 * G * D, t1.to(tl.int8), mask=columns)
    tl.store(parts + to + 4 * G * D, t2.to(tl.int8), mask=columns)
    to += h * 6 * G * D
    tl.store(wide + to, t0.to(tl.float32), mask=columns)
    tl.store(wide + to + 2 * G * D, t1.to(tl.float32), mask=columns)
    tl.store(wide + to + 4 * G * D, t2.to(tl.float32), mask=columns)
    tl.store(wide + to + 6 * G * D, p0.to(tl.float32), mask=columns)
    tl.store(wide + to + 8 * G * D, p1.to(tl.float32), mask=columns)
    tl.store(wide + to + 10 * G * D, p2.to(tl.float32), mask=columns)

    norm = length * (NORM_SLACK / ROOT)
    reference = along * (1 / ROOT) + norm * reach_closed - ROOM
    unit = scale * (16 * per_log)
    shift = along * per_log - reference * LOG2_E
    to = numbers + h * 14 * G + row
    kept = row < 2 * G
    tl.store(to, unit, mask=kept)
    tl.store(to + 2 * G, 8 * total, mask=kept)
    tl.store(to + 4 * G, shift, mask=kept)
    tl.store(to + 6 * G, unit * (1 / 256), mask=kept)
    tl.store(to + 8 * G, 8.5 * total, mask=kept)
    # A query that is not finite has no scores, and no output: fixed point would hide it.
    finite = tl.sum((tl.abs(x) < float("inf")).to(tl.int32), 1) == D
    tl.store(to + 10 * G, tl.where(finite, scale_plain * per_log, float("nan")), mask=kept)
    tl.store(to + 12 * G, -reference * LOG2_E, mask=kept)

    size = norm * (reach + centre_norm) + tl.abs(reference)
    evaluated = 32 * U * size + 2 * GAMMA * norm * (centre_norm + 0.1 * reach) + EXP_RELATIVE_ERROR
    half_a_step = ROOT * 0.5 * (1 + 2.0**-20)
    inexact = (1.1 * scale * half_a_step + 8 * U * length) * (NORM_SLACK / ROOT)
    tensor = 1.5 * (D // PRODUCTS) * TENSOR_UNIT * norm
    to = facts + h * 8 * G + row
    tl.store(to, norm, mask=kept)
    tl.store(to + 2 * G, inexact * reach * NORM_SLACK + evaluated, mask=kept)
    tl.store(to + 4 * G, scale_plain * half_a_step * (NORM_SLACK / ROOT) + tensor, mask=kept)
    tl.store(to + 6 * G, reference, mask=kept)
    _store_row(words, h, its_words, FLAGS)
    _store_row(counts, h, its_counts, COUNTS)
    _store_row(summary, h, its_summary, BLOCKS)
    tl.store(arrived + tl.arange(0, ARRIVALS) * H + h, tl.zeros((ARRIVALS,), tl.int32))


@triton.jit
def _prepare_and_append(
    q, key_centre, largest_of_head, turn, layer, all_words, all_counts, all_summary,  # inputs
    k, v, length, ring_keys, ring_values, sink_keys, sink_values,
    parts, wide, numbers, facts, words, counts, summary, arrived,  # outputs
    ring_keys_out, ring_values_out, sink_keys_out, sink_values_out,
    H: tl.constexpr, GROUP: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ROOT: tl.constexpr,
    VANISHED: tl.constexpr, ROOM: tl.constexpr, TENSOR_UNIT: tl.constexpr, GAMMA: tl.constexpr,
    FLAGS: tl.constexpr, BLOCKS: tl.constexpr, COUNTS: tl.constexpr, HEADS: tl.constexpr,
    RING: tl.constexpr, SINK: tl.constexpr, SIZE: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """In one kernel: of two, the one that is begun a moment later takes 4 us longer."""
    if tl.program_id(1) == 0:
        _prepare(
            q, key_centre, largest_of_head, turn, layer, all_words, all_counts, all_summary, parts, wide, numbers,
            facts, words, counts, summary, arrived, H, GROUP, G, D, ROOT, VANISHED, ROOM, TENSOR_UNIT, GAMMA, FLAGS,
            BLOCKS, COUNTS,
        )  # fmt: skip
    else:
        append_token(
            k, v, length, layer, ring_keys, ring_values, sink_keys, sink_values, ring_keys_out, ring_values_out,
            sink_keys_out, sink_values_out, H, HEADS, RING, SINK, SIZE, D, CAPACITY,
        )  # fmt: skip


def prepare_queries(
    q: jax.Array,  # [H, group, d] float32
    key_centre: jax.Array,  # [L, H, d] float32
    largest: jax.Array,  # [L, 6, H] float32, of `operands.Shared`
    turn: np.ndarray,  # [d, d] float32, R^T
    layer: jax.Array,  # [1] int32
    plan: tuple[jax.Array, jax.Array, jax.Array],  # of `operands.Shared`: words, counts, summary, [L, H, .]
    *,
    vanished: float,
    room: float,
    tensor_unit: float,
    token: Append | None = None,
) -> tuple[qr.Operands, jax.Array, list[jax.Array], jax.Array, list[jax.Array]]:
    """Operands; `[H, 4, C]` of norm, eps, eps_original and reference of `operands.Queries`; the layer's plan; zeros,
    `[ARRIVALS H]` int32, by which programs of later kernels count themselves; and the windows, as `append_to_windows`
    returns them, where there is a token."""
    heads, group, d = q.shape
    columns = qr.columns(group)
    f32 = jnp.float32
    flags, n_counts, blocks = (x.shape[2] for x in plan)
    inputs = q, key_centre, largest, jnp.asarray(np.sign(turn), jnp.int8), layer, *plan
    out = [
        jax.ShapeDtypeStruct((heads, qr.PARTS, columns, d), jnp.int8),
        jax.ShapeDtypeStruct((heads, 2 * qr.PARTS, columns, d), jnp.bfloat16),
        jax.ShapeDtypeStruct((heads, qr.NUMBERS, columns), f32),
        jax.ShapeDtypeStruct((heads, 4, columns), f32),
        *[jax.ShapeDtypeStruct((heads, n), jnp.int32) for n in (flags, n_counts, blocks)],
        jax.ShapeDtypeStruct((rc.ARRIVALS * heads,), jnp.int32),
    ]
    constants = dict(
        warps=16, H=heads, GROUP=group, G=columns // 2, D=d, ROOT=d**0.5, VANISHED=vanished, ROOM=room,
        TENSOR_UNIT=tensor_unit, GAMMA=num.gamma(d + 4), FLAGS=flags, BLOCKS=blocks, COUNTS=n_counts,
    )  # fmt: skip
    if token is None:
        found, windows = launch(_prepare, *inputs, out=out, grid=(heads,), **constants), []
    else:
        first = len(inputs) + 3
        found = launch(
            _prepare_and_append, *inputs, token.k, token.v, token.length, *token.windows, out=[*out, *token.shapes],
            grid=(heads, 2), in_place={first + i: len(out) + i for i in range(4)}, **constants, **token.constants,
        )  # fmt: skip
        found, windows = found[: len(out)], found[len(out) :]
    *operands, facts, words, counts, summary, arrived = found
    return qr.Operands(*operands), facts, [words, counts, summary], arrived, windows
