"""The contract of a tier-1 format, and the error annotations common to all of them.

A codec turns one block of originals into arrays and back, at one precision or at several nested ones. It is free to
be as lossy as it likes: the annotations are measured on what it stored, one set a precision, and the certificate
rests on the annotations alone.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from certjax.codecs import notes as nt
from pallas_kernels import numerics as num

Codes = Any
"""A codec's own pytree. Every leaf has the block axis where the keys had it: [..., NB, ...]."""

Level = int | jax.Array
"""A precision: 0 is the coarsest. Static for all blocks, or an int32 array `[..., NB]`."""


@flax.struct.dataclass
class HeadStats:
    """What is known of a KV head from its prompt, for codecs that centre or scale by it.

    Attributes
    ----------
    key_centre, value_centre : `[..., d]` float32
        `key_centre` is 0 where the codec is not `centred`; `value_centre` is also the `c` of `nu_t = ||v_t - c||`.
    key_peak, value_peak : `[...]` float32, or None
        Largest absolute element, for codecs that scale by it.
    """

    key_centre: jax.Array
    value_centre: jax.Array
    key_peak: jax.Array | None = None
    value_peak: jax.Array | None = None


@flax.struct.dataclass
class Doubt:
    """How far, in norm, two evaluations of a centre may lie apart, `[...]` each."""

    key_centre: jax.Array
    value_centre: jax.Array


class Codec(Protocol):
    """A tier-1 format. Instances are frozen dataclasses: hashable, static under jit.

    Decoded vectors are in the codec's own basis: `k^ = from_basis(keys(...)) + key_centre` where `centred`, and
    `keys(...)` itself elsewhere; values likewise. Attention turns the query into that basis and the output out of it.

    Attributes
    ----------
    key_levels, value_levels
        Nested precisions in which codes can be read.
    centred
        Decoded vectors are relative to the centres of `HeadStats`.
    scaled
        The peaks of `HeadStats` are needed.
    """

    name: str
    key_levels: int
    value_levels: int
    centred: bool
    scaled: bool

    def encode(self, keys: jax.Array, values: jax.Array, stats: HeadStats) -> Codes:
        """Quantize float32 blocks `[..., NB, B, d]` of keys and values; leaves of `stats` are `[..., d]`, `[...]`."""

    def keys(self, codes: Codes, level: Level) -> jax.Array:
        """Decoded keys, float32 `[..., NB, B, d]`. `level` counts from 0."""

    def values(self, codes: Codes, level: Level) -> jax.Array:
        """Decoded values, float32 `[..., NB, B, d]`. `level` counts from 0."""

    def to_basis(self, x: jax.Array) -> jax.Array:
        """An orthogonal map of `[..., d]` float32, within `rounding(d)` of exact in norm, relatively."""

    def from_basis(self, y: jax.Array) -> jax.Array:
        """The inverse of `to_basis`, as precise."""

    def rounding(self, d: int) -> float:
        """Relative error in norm of the two maps; 0 where they do nothing."""

    def key_slack(self, codes: Codes, level: int, stats: HeadStats, doubt: Doubt) -> jax.Array:
        """Bound `[..., NB, B]` on how far two float32 evaluations of `decode_keys` of the same codes can lie apart (a
        compiler may or may not contract a multiplication and an addition)."""

    def value_slack(self, codes: Codes, level: int, stats: HeadStats, doubt: Doubt) -> jax.Array:
        """The same for `decode_values`."""

    def steps(self, codes: Codes) -> tuple[jax.Array, jax.Array] | None:
        """What each token's key codes and value codes are multiplied by, float32 `[..., NB, B]` each; None where that
        is no one number."""

    def channel_bound(self, abs_q: jax.Array, codes: Codes) -> jax.Array | None:
        """Bound on `|q.(k_t - k^_t)|` of every token of a block from per-channel steps, or None.

        `abs_q`: `[..., G, d]`, leaves of `codes`: `[..., NB, ...]`; returns `[..., G, NB]`.
        """

    def paper_step_norm(self, codes: Codes) -> jax.Array | None:
        """`||sigma|| / 2` per block `[..., NB]` for the paper's form of Delta; None without channel steps."""

    def key_bytes(self, size: int, d: int) -> tuple[int, ...]:
        """Bytes to read of a block of `size` tokens for its keys, codes and metadata, at each level."""

    def value_bytes(self, size: int, d: int) -> tuple[int, ...]:
        """The same for its values."""


class Unturned:
    """Of codecs that keep the originals' basis and centre."""

    centred = False

    def to_basis(self, x: jax.Array) -> jax.Array:
        return x

    def from_basis(self, y: jax.Array) -> jax.Array:
        return y

    def rounding(self, d: int) -> float:
        return 0.0

    def steps(self, codes: Codes) -> None:
        return None


def decode_keys(codec: Codec, codes: Codes, stats: HeadStats, level: Level) -> jax.Array:
    """`k^`: what tier 1 says the keys are, float32 `[..., NB, B, d]`, in their original basis."""
    return _decode(codec, codec.keys(codes, level), stats.key_centre)


def decode_values(codec: Codec, codes: Codes, stats: HeadStats, level: Level) -> jax.Array:
    """`v^`: what tier 1 says the values are, float32 `[..., NB, B, d]`, in their original basis."""
    return _decode(codec, codec.values(codes, level), stats.value_centre)


def _decode(codec: Codec, y: jax.Array, centre: jax.Array) -> jax.Array:
    return codec.from_basis(y) + centre[..., None, None, :] if codec.centred else y


@flax.struct.dataclass
class Annotations:
    """Error annotations of tier 1 (symbols of docs/bounds.md), each rounded up when stored.

    Attributes
    ----------
    kappa : `[..., NB, Lk, B]`
        Per key level and token `||k_t - k^_t||`.
    eta : `[..., NB, Lv, B]`
        Per value level and token `||v_t - v^_t||`.
    nu : `[..., NB, B]`
        Per token `||v_t - c||`.
    sigma_k : `[..., NB, Lk]` bfloat16, or None
        Spectral norm of the block's matrix of residuals `k_t - k^_t`.
    sigma_v : `[..., NB, 1 + Lv]` bfloat16, or None
        Spectral norms of `v_t - c`, then of `v_t - v^_t` level by level.
    rho_k, rho_v : `[..., NB, Lk]`, `[..., NB, Lv]` bfloat16, or None
        Largest `||k_t - k^_t|| / s_t` and `||v_t - v^_t|| / s_t` of a large block, level by level, with `s_t` the
        codec's `steps`; infinite where some `s_t` is too small to speak for its token.
    k_norm : `[..., NB]` bfloat16
        Largest `max(||k_t - c_k||, ||k^_t - c_k||)` of the block, with `c_k` the centre of the keys where the codec is
        centred and 0 elsewhere: scales the rounding of a computed score.
    checksum : `[..., NB]` uint32
        Fingerprint of codes, metadata and annotations (precondition P1).
    """

    kappa: nt.Note
    eta: nt.Note
    nu: nt.Note
    sigma_k: jax.Array | None
    sigma_v: jax.Array | None
    rho_k: jax.Array | None
    rho_v: jax.Array | None
    k_norm: jax.Array
    checksum: jax.Array


def annotate(
    codec: Codec,
    keys: jax.Array,
    values: jax.Array,
    stats: HeadStats,
    codes: Codes,
    doubt: Doubt | None = None,
    *,
    form: nt.NoteFormat = "bfloat16",
    spectral: bool = False,
) -> Annotations:
    """Measure what `codes` lost. `keys`, `values`: float32 `[..., NB, B, d]`; `stats`: leaves `[..., d]`, `[...]`.

    `doubt`: where the centres are computed in the same program, the compiler may evaluate them twice and round
    differently. Every annotation holds for the ones that are stored.
    """
    if doubt is None:
        nothing = jnp.zeros(stats.key_centre.shape[:-1])
        doubt = Doubt(key_centre=nothing, value_centre=nothing)
    measured_k = []
    centre = stats.key_centre[..., None, None, :] if codec.centred else 0.0
    reach = num.norm_up(keys - centre) + doubt.key_centre[..., None, None]
    for level in range(codec.key_levels):
        k_hat = decode_keys(codec, codes, stats, level)
        slack = codec.key_slack(codes, level, stats, doubt)
        measured_k.append(_residual(keys - k_hat, slack, spectral))
        reach = jnp.maximum(reach, num.norm_up(k_hat - centre) + slack)
    apart = jnp.broadcast_to(doubt.value_centre[..., None, None], reach.shape)
    nu, nu_spectral = _residual(values - stats.value_centre[..., None, None, :], apart, spectral)
    measured_v = [
        _residual(
            values - decode_values(codec, codes, stats, level), codec.value_slack(codes, level, stats, doubt), spectral
        )
        for level in range(codec.value_levels)
    ]
    steps = codec.steps(codes) if spectral and keys.shape[-2] >= LARGE_BLOCK else None
    rho_k, rho_v = [
        None if steps is None else jnp.stack([_in_steps(norm, step) for norm, _ in measured], -1)
        for measured, step in zip((measured_k, measured_v), steps or (None, None), strict=True)
    ]
    notes = Annotations(
        kappa=nt.store(jnp.stack([norm for norm, _ in measured_k], -2), form),
        eta=nt.store(jnp.stack([norm for norm, _ in measured_v], -2), form),
        nu=nt.store(nu, form),
        sigma_k=num.round_up_bf16(jnp.stack([s for _, s in measured_k], -1)) if spectral else None,
        sigma_v=num.round_up_bf16(jnp.stack([nu_spectral, *(s for _, s in measured_v)], -1)) if spectral else None,
        rho_k=rho_k,
        rho_v=rho_v,
        k_norm=num.round_up_bf16((reach * num.NORM_SLACK).max(-1)),
        checksum=jnp.zeros(keys.shape[:-2], jnp.uint32),
    )
    notes = lax.optimization_barrier(notes)
    return notes.replace(checksum=fingerprint(codes, notes))


LARGE_BLOCK = 64
"""Tokens of a block from which on its bound is made of sums over it (the fused kernels'), not token by token."""

SMALLEST_STEP = 2.0**-60
"""Sums of weights times steps below this may vanish."""


def _in_steps(norms: jax.Array, step: jax.Array) -> jax.Array:
    """Least number of steps that no token's residual exceeds: `[..., B]`, `[..., B]` -> `[...]` bfloat16."""
    ratio = norms / jnp.where(step < SMALLEST_STEP, 1.0, step) * num.NORM_SLACK
    ratio = jnp.where((step < SMALLEST_STEP) & (norms > 0), jnp.inf, ratio)
    return num.round_up_bf16(ratio.max(-1))


def _residual(r: jax.Array, slack: jax.Array, spectral: bool) -> tuple[jax.Array, jax.Array | None]:
    """Norms `[..., B]` of the rows of `r` [..., B, d] and its spectral norm `[...]`, for rows uncertain by `slack`."""
    norms = (num.norm_up(r) + slack) * num.NORM_SLACK
    return norms, (num.spectral_norm_up(r) + num.norm_up(slack)) * num.NORM_SLACK if spectral else None


def fingerprint(codes: Codes, notes: Annotations) -> jax.Array:
    """uint32 `[..., NB]` over everything stored for a block. Any single changed element changes it."""
    leading = notes.checksum.ndim
    leaves = jax.tree.leaves((codes, notes.replace(checksum=None)))
    return functools.reduce(operator.add, (_weighted_bits(x, leading, i) for i, x in enumerate(leaves)))


def _weighted_bits(x: jax.Array, leading: int, salt: int) -> jax.Array:
    """Sum of an array's bit patterns times odd weights, modulo 2^32, over all but the `leading` axes."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32).reshape(*x.shape[:leading], -1)
    place = jnp.arange(bits.shape[-1], dtype=jnp.uint32) + jnp.uint32(salt * 0x9E3779B1 & 0xFFFFFFFF)
    # An odd factor is invertible modulo 2^32: a changed element cannot leave its term unchanged.
    return (bits * (place * jnp.uint32(2654435761) | jnp.uint32(1))).sum(-1, dtype=jnp.uint32)
