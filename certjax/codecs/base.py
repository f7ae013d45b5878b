"""The contract of a tier-1 format, and the error annotations common to all of them.

A codec turns one block of originals into arrays and back. It is free to be as lossy as it likes: the
annotations are measured on what it stored, and the certificate rests on the annotations alone.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import numerics as num

Codes = Any
"""A codec's own pytree. Every leaf has the block axis where the keys had it: [..., NB, ...]."""


@flax.struct.dataclass
class Centres:
    """What a codec may subtract from the keys and values of a KV head before it quantizes them.

    Attributes
    ----------
    keys, values : `[..., d]` float32
        `values` is also the `c` of `nu_t = ||v_t - c||`.
    """

    keys: jax.Array
    values: jax.Array


class Codec(Protocol):
    """A tier-1 format. Instances are frozen dataclasses: hashable, static under jit."""

    name: str

    def encode(self, keys: jax.Array, values: jax.Array, centres: Centres) -> Codes:
        """Quantize float32 blocks `[..., NB, B, d]` of keys and values; centres are `[..., d]`."""

    def decode_keys(self, codes: Codes, centres: Centres) -> jax.Array:
        """What tier 1 says the keys are: float32 `[..., NB, B, d]`."""

    def decode_values(self, codes: Codes, centres: Centres) -> jax.Array:
        """What tier 1 says the values are: float32 `[..., NB, B, d]`."""

    def decode_slack(self, codes: Codes, centres: Centres, doubt: Centres) -> tuple[jax.Array, jax.Array]:
        """Bounds `[..., NB, B]` on how far two float32 evaluations of decode_keys / decode_values of the same
        codes can lie apart (a compiler may or may not contract a multiplication and an addition), the centres
        of the two being apart by at most `doubt` `[...]`."""

    def channel_bound(self, abs_q: jax.Array, codes: Codes) -> jax.Array | None:
        """Bound on `|q.(k_t - k^_t)|` of every token of a block from per-channel steps, or None.

        `abs_q`: `[..., G, d]`, leaves of `codes`: `[..., NB, ...]`; returns `[..., G, NB]`.
        """

    def paper_step_norm(self, codes: Codes) -> jax.Array | None:
        """`||sigma|| / 2` per block `[..., NB]` for the paper's form of Delta; None without channel steps."""


@flax.struct.dataclass
class Annotations:
    """Error annotations of tier 1 (symbols of docs/bounds.md), each rounded up to bfloat16.

    Attributes
    ----------
    kappa, eta, nu : `[..., NB, B]`
        Per token `||k_t - k^_t||`, `||v_t - v^_t||`, `||v_t - c||`.
    k_norm : `[..., NB]`
        Largest `max(||k_t||, ||k^_t||)` of the block: scales the rounding of a computed score.
    checksum : `[..., NB]` uint32
        Fingerprint of codes, metadata and annotations (precondition P1).
    """

    kappa: jax.Array
    eta: jax.Array
    nu: jax.Array
    k_norm: jax.Array
    checksum: jax.Array


def annotate(
    codec: Codec,
    keys: jax.Array,
    values: jax.Array,
    centres: Centres,
    codes: Codes,
    doubt: Centres | None = None,
) -> Annotations:
    """Measure what `codes` lost. `keys`, `values`: float32 `[..., NB, B, d]`; `centres`: leaves `[..., d]`.

    `doubt`, leaves `[...]`: where the centres are computed in the same program, the compiler may evaluate them
    twice and round differently, by so much in norm. Every annotation holds for the ones that are stored.
    """
    doubt = jax.tree.map(lambda c: jnp.zeros(c.shape[:-1]), centres) if doubt is None else doubt
    k_hat, v_hat = codec.decode_keys(codes, centres), codec.decode_values(codes, centres)
    k_slack, v_slack = codec.decode_slack(codes, centres, doubt)
    notes = Annotations(
        kappa=num.round_up_bf16((num.norm_up(keys - k_hat) + k_slack) * num.NORM_SLACK),
        eta=num.round_up_bf16((num.norm_up(values - v_hat) + v_slack) * num.NORM_SLACK),
        nu=num.round_up_bf16(
            (num.norm_up(values - centres.values[..., None, None, :]) + doubt.values[..., None, None])
            * num.NORM_SLACK
        ),
        k_norm=num.round_up_bf16(
            (jnp.maximum(num.norm_up(keys), num.norm_up(k_hat) + k_slack) * num.NORM_SLACK).max(-1)
        ),
        checksum=jnp.zeros(keys.shape[:-2], jnp.uint32),
    )
    notes = lax.optimization_barrier(notes)
    return notes.replace(checksum=fingerprint(codes, notes))


def fingerprint(codes: Codes, notes: Annotations) -> jax.Array:
    """uint32 `[..., NB]` over everything stored for a block. Any single changed element changes it."""
    leading = notes.checksum.ndim
    leaves = jax.tree.leaves(codes) + [notes.kappa, notes.eta, notes.nu, notes.k_norm]
    return functools.reduce(operator.add, (_weighted_bits(x, leading, i) for i, x in enumerate(leaves)))


def _weighted_bits(x: jax.Array, leading: int, salt: int) -> jax.Array:
    """Sum of an array's bit patterns times odd weights, modulo 2^32, over all but the `leading` axes."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32).reshape(*x.shape[:leading], -1)
    place = jnp.arange(bits.shape[-1], dtype=jnp.uint32) + jnp.uint32(salt * 0x9E3779B1 & 0xFFFFFFFF)
    # An odd factor is invertible modulo 2^32: a changed element cannot leave its term unchanged.
    return (bits * (place * jnp.uint32(2654435761) | jnp.uint32(1))).sum(-1, dtype=jnp.uint32)
