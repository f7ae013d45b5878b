"""Output and certificate of a pass, and who goes dense.

The programs of a head add up what tiles add to its bound (`tally`) and what was found of values (`join`); the last of
them to be done puts that together (`bound`), and in a second pass the last head of a row decides (`verdict`). A kernel
for each of these would wait for the one before to be over and itself to be begun. Twin: `certjax.fused.bound.judge`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from pallas_kernels import levels as lv
from pallas_kernels import numerics as num
from pallas_kernels.device_math import is_last
from pallas_kernels.judge import record as rc
from pallas_kernels.judge.bound import judge_head
from pallas_kernels.judge.contract import Contract
from pallas_kernels.judge.join import CHANNELS, join_channels
from pallas_kernels.judge.record import AGAIN, FIRST, OF_ROWS, PASSED, ROWS, Rounding
from pallas_kernels.judge.tally import ADDED, tally_tiles, tiles_and_parts
from pallas_kernels.judge.verdict import decide_row
from pallas_kernels.launch import launch
from pallas_kernels.tile_facts import NOTES

REDO = tl.constexpr(rc.REDO)


@triton.jit
def _add_up(
    h, part,
    words, stats, fine_stats, kappa, eta, nu, sigma_k, sigma_v, rho_k, rho_v, coarse, fine, window_acc, window_sums,
    host_acc, host_sums, counts, facts, meta, layer,  # inputs
    sums, kappa_max, joined, exact_sums,  # outputs
    H: tl.constexpr, NT: tl.constexpr, FLAGS: tl.constexpr, PARTS: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    T: tl.constexpr, ALL_PIECES: tl.constexpr, S: tl.constexpr, FINE_S: tl.constexpr, W: tl.constexpr,
    P: tl.constexpr, CHANNELS: tl.constexpr, HIGHEST: tl.constexpr,
):  # fmt: skip
    """A share of tiles, or of channels."""
    if part < PARTS:
        tally_tiles(
            h, part, PARTS, words, stats, fine_stats, kappa, eta, nu, sigma_k, sigma_v, rho_k, rho_v, facts,
            meta, layer, sums, kappa_max, H, NT, FLAGS, C, T, ALL_PIECES,
        )  # fmt: skip
    else:
        join_channels(
            h, part - PARTS, coarse, fine, window_acc, window_sums, host_acc, host_sums, counts, joined,
            exact_sums, S, FINE_S, W, P, C, D, CHANNELS, HIGHEST,
        )  # fmt: skip


@triton.jit
def _judge(
    words, stats, fine_stats, kappa, eta, nu, sigma_k, sigma_v, rho_k, rho_v, coarse, fine, window_acc, window_sums,
    host_acc, host_sums, counts, summary, facts, largest_of_head, value_centre, turn, meta, layer, before,  # inputs
    sums, kappa_max, joined, exact_sums, out, record, arrived,  # outputs
    H: tl.constexpr, NT: tl.constexpr, FLAGS: tl.constexpr, PARTS: tl.constexpr, PARTS_UP: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, T: tl.constexpr, ALL_PIECES: tl.constexpr, S: tl.constexpr,
    FINE_S: tl.constexpr, W: tl.constexpr, P: tl.constexpr, CHANNELS: tl.constexpr,
    HIGHEST: tl.constexpr, ROOT: tl.constexpr, VANISHED: tl.constexpr, SPLIT: tl.constexpr, TURNING: tl.constexpr,
    DEPTH_GAMMA: tl.constexpr, INFLATE: tl.constexpr, EXP_RELATIVE_ERROR: tl.constexpr, CANARY: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCKS_UP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    h, part = tl.program_id(0), tl.program_id(1)
    _add_up(
        h, part, words, stats, fine_stats, kappa, eta, nu, sigma_k, sigma_v, rho_k, rho_v, coarse, fine,
        window_acc, window_sums, host_acc, host_sums, counts, facts, meta, layer, sums, kappa_max, joined, exact_sums,
        H, NT, FLAGS, PARTS, C, D, T, ALL_PIECES, S, FINE_S, W, P, CHANNELS, HIGHEST,
    )  # fmt: skip
    if is_last(arrived + FIRST * H + h, PARTS + D // CHANNELS):
        judge_head(
            h, sums, kappa_max, joined, exact_sums, summary, facts, largest_of_head, value_centre, turn, layer,
            out, record, tl.full((C,), 1.0, tl.float32), H, NT, PARTS, PARTS_UP, C, D, ROOT, VANISHED, SPLIT, TURNING,
            DEPTH_GAMMA, INFLATE, EXP_RELATIVE_ERROR, CANARY, BLOCKS, BLOCKS_UP, GROUP,
        )  # fmt: skip


@triton.jit
def _judge_again(
    words, stats, fine_stats, kappa, eta, nu, sigma_k, sigma_v, rho_k, rho_v, coarse, fine, window_acc, window_sums,
    host_acc, host_sums, counts, summary, facts, largest_of_head, value_centre, turn, meta, layer, asked, sound,
    dense_before, out_before, record_before, before,  # inputs
    sums, kappa_max, joined, exact_sums, dense, out, record, arrived,  # outputs
    H: tl.constexpr, NT: tl.constexpr, FLAGS: tl.constexpr, PARTS: tl.constexpr, PARTS_UP: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, T: tl.constexpr, ALL_PIECES: tl.constexpr, S: tl.constexpr,
    FINE_S: tl.constexpr, W: tl.constexpr, P: tl.constexpr, CHANNELS: tl.constexpr,
    HIGHEST: tl.constexpr, ROOT: tl.constexpr, VANISHED: tl.constexpr, SPLIT: tl.constexpr, TURNING: tl.constexpr,
    DEPTH_GAMMA: tl.constexpr, INFLATE: tl.constexpr, EXP_RELATIVE_ERROR: tl.constexpr, CANARY: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCKS_UP: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, HEADS_UP: tl.constexpr,
    RELATIVE_TO: tl.constexpr, TOLERANCE: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """What the second pass found, in place of what the first did, for rows of which it was asked; and who of them goes
    dense."""
    h, part = tl.program_id(0), tl.program_id(1)
    if tl.load(asked + h) == REDO:
        _add_up(
            h, part, words, stats, fine_stats, kappa, eta, nu, sigma_k, sigma_v, rho_k, rho_v, coarse, fine,
            window_acc, window_sums, host_acc, host_sums, counts, facts, meta, layer, sums, kappa_max, joined,
            exact_sums, H, NT, FLAGS, PARTS, C, D, T, ALL_PIECES, S, FINE_S, W, P, CHANNELS, HIGHEST,
        )  # fmt: skip
        if is_last(arrived + AGAIN * H + h, PARTS + D // CHANNELS):
            passed = tl.load(record + (h * ROWS + PASSED) * C + tl.arange(0, C))
            judge_head(
                h, sums, kappa_max, joined, exact_sums, summary, facts, largest_of_head, value_centre, turn, layer,
                out, record, passed, H, NT, PARTS, PARTS_UP, C, D, ROOT, VANISHED, SPLIT, TURNING, DEPTH_GAMMA,
                INFLATE, EXP_RELATIVE_ERROR, CANARY, BLOCKS, BLOCKS_UP, GROUP,
            )  # fmt: skip
            batch = h // HEADS
            if is_last(arrived + OF_ROWS * H + batch, HEADS):
                decide_row(
                    batch, record, counts, sound, dense, HEADS, HEADS_UP, GROUP, C, RELATIVE_TO, TOLERANCE, POOLED
                )


@dataclasses.dataclass(frozen=True)
class Found:
    """What was read of a layer by a plan, and the plan."""

    words: jax.Array  # [H, flags] int32, `pallas_kernels.levels`
    counts: jax.Array  # [H, COUNTS] int32
    summary: jax.Array  # [H, .] int32
    scanned: jax.Array  # [H, NT, 4, C] of the scan
    coarse: jax.Array  # [H, S, d, C], values with the scan's weights
    fine: tuple[jax.Array, jax.Array]  # [H, S', d, C], [H, NT, 4, C]
    windows: tuple[jax.Array, jax.Array]  # [H, W, d, C], [H, W, 4, C]
    promoted: tuple[jax.Array, jax.Array]  # [H, P, d, C], [H, P, 4, C]


@dataclasses.dataclass(frozen=True)
class Layer:
    """What else the judgement of a layer rests on."""

    notes: dict[str, jax.Array]
    facts: jax.Array  # [H, 4, C]
    largest: jax.Array  # [L, 6, H]
    value_centre: jax.Array  # [L, H, d]
    turn: np.ndarray  # [d, d], R^T
    meta: jax.Array
    index: jax.Array  # [1] int32


def judge(
    found: Found, layer: Layer, arrived: jax.Array, rounding: Rounding, *, group: int, canary: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Outputs `[H, group, d]`, and the rows of `record`, `[H, ROWS, C]`, float32; and `arrived` for `judge_again`."""
    adding, arrays, of_heads, constants = _of_heads(found, layer, rounding, group, canary)
    inputs, outputs = [*arrays, arrived], [*adding, *of_heads, arrived]
    *_, out, record, arrived = launch(
        _judge, *inputs, out=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        in_place={len(inputs) - 1: len(outputs) - 1}, **constants,
    )  # fmt: skip
    return out, record, arrived


def judge_again(
    found: Found, layer: Layer, asked: jax.Array, verdict: jax.Array, out: jax.Array,
    record: jax.Array, arrived: jax.Array, sound: jax.Array, rounding: Rounding, contract: Contract, *, canary: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """`out` and `record` of `judge` and the verdict of `plan.choose`, where a second pass was `asked` for what that
    found. `sound`: [b] bool."""
    adding, arrays, _, constants = _of_heads(found, layer, rounding, out.shape[1], canary)
    changed = [verdict, out, record, arrived]
    inputs, outputs = [*arrays, asked, sound, *changed], [*adding, *changed]
    *_, dense, out, record, arrived = launch(
        _judge_again, *inputs, out=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        in_place={len(inputs) - i: len(outputs) - i for i in range(1, 5)}, **constants, **contract.constants,
    )  # fmt: skip
    return out, record, dense, arrived


def _of_heads(found: Found, layer: Layer, rounding: Rounding, group: int, canary: bool):
    """Shapes of what programs add up; arrays; shapes of output and record; and constants, the grid among them."""
    heads, n_tiles, _, columns = found.scanned.shape
    splits, d, f32, blocks = *found.coarse.shape[1:3], jnp.float32, found.summary.shape[-1]
    tiles, parts = tiles_and_parts(n_tiles)
    assert d % CHANNELS == 0, "a program of a head would be missing, and the last never come"

    def shape(*of):
        return jax.ShapeDtypeStruct((heads, *of), f32)

    adding = shape(parts, columns, ADDED.value), shape(parts), shape(2, d, columns), shape(4, columns)
    arrays = (
        found.words, found.scanned, found.fine[1], *(layer.notes[x] for x in NOTES), found.coarse, found.fine[0],
        *found.windows, *found.promoted, found.counts, found.summary, layer.facts, layer.largest, layer.value_centre,
        jnp.asarray(np.sign(layer.turn), jnp.int8), layer.meta, layer.index,
    )  # fmt: skip
    constants = dict(
        grid=(heads, parts + d // CHANNELS), warps=8, H=heads, NT=n_tiles, FLAGS=found.words.shape[-1], PARTS=parts,
        PARTS_UP=triton.next_power_of_2(parts), C=columns, D=d, T=tiles,
        ALL_PIECES=lv.word(lv.PROMOTED, lv.every_piece(d)), S=splits, FINE_S=found.fine[0].shape[1],
        W=found.windows[0].shape[1], P=found.promoted[0].shape[1], CHANNELS=CHANNELS,
        HIGHEST=rounding.highest, ROOT=d**0.5, VANISHED=rounding.vanished, SPLIT=rounding.split,
        TURNING=rounding.turning, DEPTH_GAMMA=rounding.depth_gamma, INFLATE=rounding.inflate,
        EXP_RELATIVE_ERROR=num.EXP_RELATIVE_ERROR, CANARY=canary, BLOCKS=blocks,
        BLOCKS_UP=triton.next_power_of_2(blocks), GROUP=group,
    )  # fmt: skip
    return adding, arrays, (shape(group, d), shape(ROWS.value, columns)), constants
