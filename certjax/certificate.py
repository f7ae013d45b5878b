"""The certificate of a head-step: what is known about the distance of an output to exact attention."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Certificate:
    """One record per head-step; every leaf is `[batch, Hq]`.

    *Candidate* fields speak of the quantized attempt (after rungs 1 and 2, before rungs 3 and 4); the others
    of the vector that was returned. A dense head-step has `e_key = e_val = 0`.

    Attributes
    ----------
    e_key, e_val, e_arith
        Bounds on the error from tier-1 keys, tier-1 values, and the arithmetic of the kernels.
    e_total
        Certified bound: `||O_returned - O*|| <= e_total`, always. At most `e_key + e_val + e_arith`, less
        where the trivial bound (both vectors lie in the values' ball) is smaller.
    e_key_paper, e_val_paper
        The paper's bounds for the same head-step.
    tolerance
        What the budget policy allowed, in units of the output; infinite for the paper policy.
    tail_mass
        Softmax mass, by tier-1 scores, of blocks whose keys were not original.
    delta_max
        Largest score perturbation Delta_t left.
    k_star, n_value_promoted
        Blocks whose keys / values were replaced by originals.
    n_key_refined, n_value_refined
        Blocks of tier 1 read beyond their coarsest precision (the rung between "nothing promoted" and promotion from
        the host); shared by the query heads of a KV head.
    n_value_skipped
        Blocks whose values were not read at all, the centre standing for them.
    rung
        0 nothing promoted, 1 key blocks promoted beyond the base set, 2 value blocks promoted, 3 dense (this
        head), 4 dense (whole layer, a check failed).
    ranking_ok, boundary_ok, canary_ok, precondition_ok
        Outcomes of the checks; `precondition_ok` joins P1 (fingerprints), P3 (finite scores and
        bounds) and P5 (a place for every token).
    bytes_read
        Read on the device by the plan, charged once per KV head to its first query head: tier 1 at the chosen
        precisions with its annotations, the windows, the share of tier 1 whose fingerprints were checked. What a kernel
        that follows the plan reads; the XLA path decodes whole planes and selects.
    bytes_paged_in
        Read from tier 2, charged once per KV head to the first query head that asked. Both are float32, exact up to
        2^24 and to 2^-24 of themselves beyond.
    out_norm
        `||O_returned||`.
    """

    e_key: jax.Array
    e_val: jax.Array
    e_arith: jax.Array
    e_total: jax.Array
    e_key_paper: jax.Array
    e_val_paper: jax.Array
    e_key_candidate: jax.Array
    e_val_candidate: jax.Array
    e_arith_candidate: jax.Array
    e_total_candidate: jax.Array
    e_key_paper_candidate: jax.Array
    e_val_paper_candidate: jax.Array
    out_norm: jax.Array
    out_norm_candidate: jax.Array
    tolerance: jax.Array
    tail_mass: jax.Array
    delta_max: jax.Array
    k_star: jax.Array
    n_value_promoted: jax.Array
    n_key_refined: jax.Array
    n_value_refined: jax.Array
    n_value_skipped: jax.Array
    rung: jax.Array
    ranking_ok: jax.Array
    boundary_ok: jax.Array
    canary_ok: jax.Array
    precondition_ok: jax.Array
    bytes_read: jax.Array
    bytes_paged_in: jax.Array


    def packed(self) -> jax.Array:
        """All leaves as one float32 array `[F, batch, Hq]`, so that a loop over layers stores one and not F. Counts
        are exact up to 2^24."""
        return jnp.stack([getattr(self, field.name).astype(jnp.float32) for field in dataclasses.fields(self)])

    @classmethod
    def unpacked(cls, packed: jax.Array) -> Certificate:
        """From `packed` of every layer, `[L, F, batch, Hq]`: leaves `[L, batch, Hq]`."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: packed[:, i].astype(_dtype(name)) for i, name in enumerate(names)})


_COUNTS = (
    "k_star", "n_value_promoted", "n_key_refined", "n_value_refined", "n_value_skipped", "rung",
)  # fmt: skip


def empty_certificate(shape: tuple[int, ...]) -> Certificate:
    """A buffer for records: zeros of `shape` with the dtypes that `certified_attention` returns."""

    names = [field.name for field in dataclasses.fields(Certificate)]
    return Certificate(**{name: jnp.zeros(shape, _dtype(name)) for name in names})


def _dtype(name: str):
    return jnp.int32 if name in _COUNTS else jnp.bool_ if name.endswith("_ok") else jnp.float32
