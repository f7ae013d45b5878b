"""What the kernels take: one layer of a stacked cache by reference, and the queries of a step.

A head `H = b Hkv` is a KV head of a sequence. Its query heads are padded to `G` of 4 or 8, and
repeated: `C = 2 G` columns.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from certjax.cache import TieredKVCache
from certjax.codecs import rotation
from certjax.encode import ring_block_index
from certjax.fused import reduce as rd
from pallas_kernels import numerics as num
from pallas_kernels import query as qr
from pallas_kernels.levels import FINEST, SKIP, counts_of, sane, summary_of

TILE = 128


@struct.dataclass
class Layer:
    """One layer. Arrays with an axis `L` hold all layers; the kernels index them, so that nothing is copied."""

    keys: jax.Array  # [L, H, N, d] int8
    keys_low: jax.Array  # [L, H, N, d/2] int8
    key_scale: jax.Array  # [L, H, N] bfloat16
    values: jax.Array  # [L, H, NT, d, 64] int8
    values_low: jax.Array  # [L, H, NT, d, 32] int8
    value_scale: jax.Array  # [L, H, N] bfloat16
    nu: jax.Array  # [L, H, N] uint8
    windows: tuple[jax.Array, ...]  # sink keys, sink values, ring keys, ring values: [L, H, n, d] bfloat16
    host_keys: jax.Array | None  # [L, H, N, d] bfloat16
    host_values: jax.Array | None
    kappa_peak: jax.Array  # [H, NT, 2] float32, 0 where a tile is not read
    eta_peak: jax.Array  # [H, NT, 2]
    rho_k: jax.Array  # [H, NT, 2]
    rho_v: jax.Array  # [H, NT, 2]
    nu_peak: jax.Array  # [H, NT]
    sigma_k: jax.Array  # [H, NT, 2], 0 where a tile is not read
    sigma_v: jax.Array  # [H, NT, 3]
    reach: jax.Array  # [H] largest ||k - c_k|| of the tiles read
    reach_closed: jax.Array  # [H] the same of all full blocks, those that windows hold included
    nu_max: jax.Array  # [H] largest nu of the tiles read
    eta_max: jax.Array  # [H] largest eta of the tiles read, at any level
    key_centre_norm: jax.Array  # [H] rounded up
    value_centre_norm: jax.Array  # [H]
    key_centre: jax.Array  # [H, d]
    value_centre: jax.Array  # [H, d]
    active: jax.Array  # [H, NT] bool, tiles read from tier 1
    live: jax.Array  # [H, W] int32, tokens in each window tile
    words: jax.Array  # [H, flags] int32, the plan of the step before, see `pallas_kernels.levels`
    counts: jax.Array  # [H, COUNTS] int32, of those
    summary: jax.Array  # [H, .] int32
    index: jax.Array  # [1] int32, of the layer
    meta: jax.Array  # [H, 3] int32: first and end of the active tiles, length


@struct.dataclass
class Shared:
    """What does not depend on the layer, or is a number a head, which XLA makes of all layers as fast as of one."""

    active: jax.Array  # [H, NT] bool, tiles read from tier 1
    live: jax.Array  # [H, W] int32, tokens in each window tile
    meta: jax.Array  # [H, 3] int32: first and end of the active tiles, length
    largest: jax.Array  # [L, 6, H] float32: reach, nu_max, eta_max, reach_closed, norms of the centres
    words: jax.Array  # [L, H, flags] int32, what is read of each tile, `pallas_kernels.levels`
    counts: jax.Array  # [L, H, COUNTS] int32
    summary: jax.Array  # [L, H, .] int32


def by_head(x: jax.Array) -> jax.Array:
    """`[L, b, Hkv, ...]` -> `[L, H, ...]` float32."""
    return x.reshape(x.shape[0], -1, *x.shape[3:]).astype(jnp.float32)


def shared(cache: TieredKVCache, finest: bool = False) -> Shared:
    """`cache`: stacked, leaves `[L, b, Hkv, ...]`, with `length` the tokens to attend to. `finest`: all of tier 1 is
    read as finely as it is stored, instead of by the cache's plan."""
    n_heads, size = cache.ring_keys.shape[2], cache.block_size
    length, notes = cache.length, cache.notes
    last = (length - 1) // size
    first = cache.sink_keys.shape[-2] // size
    end = jnp.clip(last - cache.ring_blocks + 1, first, cache.n_blocks)
    block = jnp.arange(cache.n_blocks)
    active = (block >= first) & (block < end[:, None])
    # The sink speaks for its blocks only until the ring holds them.
    sink = jnp.clip(jnp.minimum(length[:, None], (last - cache.ring_blocks + 1)[:, None] * size)
                    - jnp.arange(first) * size, 0, size)  # fmt: skip
    held = ring_block_index(length, cache.ring_blocks, size)
    ring = jnp.where(held >= 0, jnp.clip(length[:, None] - held * size, 0, size), 0)

    def per_head(x):
        return jnp.repeat(x, n_heads, axis=0)

    active, closed = per_head(active), per_head(block < last[:, None])
    meta = jnp.stack([jnp.full_like(length, first), end, length], -1)
    k_norm, nu, eta = (by_head(x) for x in (notes.k_norm, notes.nu.peak, notes.eta.peak.max(-1)))
    peaks = ((k_norm, active), (nu, active), (eta, active), (k_norm, closed))
    largest = rd.together(2, *((jnp.where(of, x, 0.0), rd.MAX) for x, of in peaks))  # [L, H]
    centres = (by_head(x) for x in (cache.stats.key_centre, cache.stats.value_centre))  # [L, H, d]
    norms = [
        jnp.sqrt(x) * num.NORM_SLACK + cache.head_dim**0.5 * VANISHED for x in rd.sums(-1, *(x**2 for x in centres))
    ]
    heads = (cache.ring_keys.shape[0], *active.shape)
    plan = jnp.broadcast_to(FINEST, heads) if finest else sane(cache.plan.reshape(heads).astype(jnp.int32))
    words = jnp.where(active, plan, SKIP)  # of what else there is a kernel must not read anything

    def of_layers(f, *x):  # every layer's heads at once
        return f(*(jnp.broadcast_to(y, words.shape).reshape(-1, words.shape[-1]) for y in x)).reshape(
            *words.shape[:2], -1
        )

    nobody = jnp.zeros(words.shape[0] * words.shape[1], bool)
    return Shared(
        words=jnp.pad(words, ((0, 0), (0, 0), (0, qr.row_of_flags(cache.n_blocks)[1] - cache.n_blocks))),
        counts=of_layers(lambda w, a: counts_of(w, a, nobody), words, active),
        summary=of_layers(lambda w: summary_of(w, cache.head_dim), words),
        active=active,
        live=per_head(jnp.concatenate([sink, ring], -1)).astype(jnp.int32),
        meta=per_head(meta).astype(jnp.int32),
        largest=jnp.stack([*largest, *norms], 1),
    )


def originals_of(cache: TieredKVCache) -> tuple[jax.Array | None, jax.Array | None]:
    """Keys and values of a stacked cache, `[L, H, N, d]`."""
    if cache.host_keys is None:
        return None, None
    return tuple(x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (cache.host_keys, cache.host_values))


def layer_of(cache: TieredKVCache, layer: jax.Array, common: Shared) -> Layer:
    """`cache`: as for `shared`; `layer`: [] int32."""

    def flat(x, drop=0):  # [L, b, Hkv, NB, ...] -> [L, H, ...], the next `drop` axes joined
        rest = x.shape[3:]
        return x.reshape(x.shape[0], -1, math.prod(rest[: drop + 1]), *rest[drop + 1 :])

    def here(x):  # [L, b, Hkv, ...] -> this layer's [H, ...], float32
        return by_head(jax.lax.dynamic_slice_in_dim(x, layer, 1, 0))[0]

    def of_this(x):
        return jax.lax.dynamic_index_in_dim(x, layer, 0, False)

    codes, notes, active = cache.codes, cache.notes, common.active[..., None]
    host_keys, host_values = originals_of(cache)
    windows = [
        flat(x) for x in (cache.sink_keys, cache.sink_values, cache.ring_keys, cache.ring_values) if x.shape[-2]
    ]
    reach, nu_max, eta_max, reach_closed, *norms = jax.lax.dynamic_slice_in_dim(common.largest, layer, 1, 0)[0]
    return Layer(
        keys=flat(codes.k_planes[0], 1),
        keys_low=flat(codes.k_planes[1], 1),
        key_scale=flat(codes.k_scale, 1),
        values=flat(codes.v_planes[0]),
        values_low=flat(codes.v_planes[1]),
        value_scale=flat(codes.v_scale, 1),
        nu=flat(notes.nu.share, 1),
        windows=tuple(windows),
        host_keys=host_keys,
        host_values=host_values,
        kappa_peak=jnp.where(active, here(notes.kappa.peak), 0.0),
        eta_peak=here(notes.eta.peak),
        rho_k=here(notes.rho_k),
        rho_v=here(notes.rho_v),
        nu_peak=here(notes.nu.peak),
        sigma_k=jnp.where(active, here(notes.sigma_k), 0.0),
        sigma_v=here(notes.sigma_v),
        reach=reach,
        reach_closed=reach_closed,
        nu_max=nu_max,
        eta_max=eta_max,
        key_centre_norm=norms[0],
        value_centre_norm=norms[1],
        key_centre=here(cache.stats.key_centre),
        value_centre=here(cache.stats.value_centre),
        active=common.active,
        live=common.live,
        words=of_this(common.words),
        counts=of_this(common.counts),
        summary=of_this(common.summary),
        index=layer.astype(jnp.int32)[None],
        meta=common.meta,
    )


@struct.dataclass
class Queries:
    """The queries of a step, and what every score of theirs is off by at most."""

    kernel: qr.Operands
    norm: jax.Array  # [H, G] ||q|| / sqrt(d), rounded up
    eps: jax.Array  # [H, G] bound on the error of a score from tier 1, and of its exponential
    eps_original: jax.Array  # [H, G] the same, per unit of the longest original key
    reference: jax.Array  # [H, G] what scores are less of, in nats


ROOM = 40.0
"""Weights may grow to `e^ROOM`, so that sums of their squares stay below the largest float32 (docs/kernels.md)."""

TENSOR_UNIT = 10 * num.U
"""Allowance for one accumulation of the matrix unit, relative to the sum of magnitudes (docs/kernels.md, A5)."""

VANISHED = 2.0**-62
"""Norms below this may vanish when squared."""


@functools.cache
def rotation_matrix(d: int) -> np.ndarray:
    """`R^T` with `x @ R^T = R x`, entries exact but for one rounding."""
    with jax.ensure_compile_time_eval():
        return np.asarray(rotation.rotate(jnp.eye(d, dtype=jnp.float32)))


def turn_back(y: jax.Array) -> jax.Array:
    """`R^T y` over the last axis, as a plain sum: each component is off by at most `gamma(d + 2) ||y||`."""
    return (y[..., :, None] * rotation_matrix(y.shape[-1]).T).sum(-2)


def turning_back(d: int) -> float:
    """Relative error in norm of `turn_back`."""
    return d**0.5 * num.gamma(d + 2)


def _turn(q: jax.Array, largest: jax.Array) -> jax.Array:
    """`R q`, within `4 u ||q||` in norm. `largest`: [..., 1] at least every element's size.

    Elements are cut at a multiple of `2^-16 largest` (or so): the sums of the upper parts, at most 2^23 such steps, are
    exact, and those of the lower parts too small to matter.
    """
    d = q.shape[-1]
    matrix = rotation_matrix(d)
    signs, size = np.sign(matrix).astype(np.float32), float(np.abs(matrix).max())
    k = num.exponent_above(jnp.maximum(largest, VANISHED)) - 15
    step = num.power_of_two(k)
    upper = jnp.round(q * num.power_of_two(-k))
    lower = q - upper * step
    upper, lower = rd.sums(-2, upper[..., :, None] * signs, lower[..., :, None] * signs)
    return (upper * step + lower) * size


def prepare(q: jax.Array, layer: Layer) -> Queries:
    """`q`: [H, G, d] float32, d a power of two."""
    d = q.shape[-1]
    q = jnp.pad(q, ((0, 0), (0, qr.columns(q.shape[1]) // 2 - q.shape[1]), (0, 0)))
    largest, square, centre = rd.together(
        -1, (jnp.abs(q), rd.MAX), (q * q, rd.SUM), (q * layer.key_centre[:, None], rd.SUM)
    )
    length = jnp.sqrt(square) * num.NORM_SLACK + d**0.5 * VANISHED  # ||q||
    rotated = _turn(q, largest[..., None])
    largest_turned, total = rd.together(-1, (jnp.abs(rotated), rd.MAX), (rotated, rd.SUM))
    turned, plain = qr.fixed_point(rotated, largest_turned), qr.fixed_point(q, largest)
    per_log = qr.LOG2_E * d**-0.5
    total = total * per_log
    norm = length * (d**-0.5 * num.NORM_SLACK)
    centre_norm = layer.key_centre_norm[:, None]
    reach = layer.reach[:, None]
    # Of any score but those of the block being filled, less the room that is left.
    reference = centre * d**-0.5 + norm * layer.reach_closed[:, None] - ROOM
    shift = centre * per_log - reference * qr.LOG2_E
    unit = turned.scale * (16 * per_log)
    # Everything a score is made of, by magnitude, in nats; sums over channels are in `centre` and `total` alone.
    size = norm * (reach + centre_norm) + jnp.abs(reference)
    summed = norm * (centre_norm + 0.1 * reach)
    evaluated = 32 * num.U * size + 2 * num.gamma(d + 4) * summed + num.EXP_RELATIVE_ERROR
    # `total` is that of the query before it was made fixed-point, which counts for less than a tenth.
    inexact = (1.1 * turned.error + 8 * num.U * length) * (d**-0.5 * num.NORM_SLACK)
    tensor = 1.5 * (d // num.PRODUCTS) * TENSOR_UNIT * norm
    # A query that is not finite has no scores, and no output: fixed point would hide it.
    unit_exact = jnp.where(jnp.isfinite(largest), plain.scale * per_log, jnp.nan)
    rows = {
        qr.UNIT: unit, qr.HALF: 8 * total, qr.SHIFT: shift, qr.LOW_UNIT: unit / 256, qr.HALF_FINE: 8.5 * total,
        qr.UNIT_EXACT: unit_exact, qr.SHIFT_EXACT: -reference * qr.LOG2_E,
    }  # fmt: skip
    return Queries(
        kernel=qr.operands(turned, plain, [rows[i] for i in range(len(rows))]),
        norm=norm,
        eps=inexact * reach * num.NORM_SLACK + evaluated,
        eps_original=plain.error * (d**-0.5 * num.NORM_SLACK) + tensor,
        reference=reference,
    )


def eps_of_originals(
    queries: Queries, longest: jax.Array, tiles: jax.Array | int, reference: jax.Array | float
) -> jax.Array:
    """Bound on the error of a score of an original key, and of its exponential.

    `longest`: `[H, G]`, norm of the longest key; `tiles`: of a program at most, each of which may raise the running
    maximum and multiply what went before by another exponential; `reference`: what scores were less of.
    """
    evaluated = 32 * num.U * (queries.norm * longest + jnp.abs(reference))
    evaluated += num.EXP_RELATIVE_ERROR + tiles * 2.0**-21
    return queries.eps_original * longest * num.NORM_SLACK + evaluated
