"""The certificate of a fused step, from what its kernels, or their twins, found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from certjax.cache import TieredKVCache
from certjax.certificate import Certificate
from certjax.fused.ladder import allotted
from certjax.policy import Policy
from pallas_kernels import levels as lv


class Reads(NamedTuple):
    """Of a pass over the cache; 0 where a head had none."""

    counts: jax.Array  # [H, COUNTS] int32
    pieces: jax.Array  # [H] int32, read from the host


BOUNDS = ("e_key", "e_val", "e_arith", "e_total", "e_key_paper", "e_val_paper")


def certificate(
    policy: Policy,
    cache: TieredKVCache,
    live: jax.Array,  # [H, W] int32, tokens in each window tile
    counts: jax.Array,  # [H, COUNTS] int32, `pallas_kernels.levels`, of the plan that was judged
    passes: Sequence[Reads],  # what the scan and fine read, and coarse and fine after them
    verdict: jax.Array,  # [b, Hkv] int32: 0 stays, 1 dense, 2 dense as a check of its row failed
    sound: jax.Array,  # [b] bool
    passed: jax.Array,  # [b, Hkv, G] bool, the canary
    *,
    bounds: dict[str, jax.Array],  # BOUNDS of the candidate, [b, Hkv, G] each
    candidate_norm: jax.Array,
    norm: jax.Array,  # of what is returned
    e_total: jax.Array,
    tail_mass: jax.Array,
    delta_max: jax.Array,
) -> Certificate:
    """Leaves `[b, Hkv, G]`."""
    batch, n_heads, group = shape = norm.shape
    d = cache.head_dim

    def of_head(x):
        return jnp.broadcast_to(x.reshape(batch, n_heads, 1), shape)

    dense = of_head(verdict > 0)
    n_active, n_coarse, n_values, n_finest, n_promoted = (of_head(counts[:, i]) for i in range(5))
    returned = {name: jnp.where(dense, 0.0, x) for name, x in bounds.items()}
    returned |= {"e_total": e_total, "e_arith": jnp.where(dense, e_total, bounds["e_arith"])}
    in_windows = of_head(sum(live[:, i] for i in range(live.shape[1])))
    n_pieces = of_head(sum(x.pieces for x in passes))
    paged = jnp.where(dense, cache.length[:, None, None], 0) + n_pieces * lv.tokens_of_a_piece(d)
    read = of_head(tier1_bytes(d, passes)) + in_windows * (4.0 * d)
    first, true = jnp.arange(group) == 0, jnp.ones(shape, bool)
    return Certificate(
        **returned,
        **{f"{name}_candidate": x for name, x in bounds.items()},
        out_norm=norm,
        out_norm_candidate=candidate_norm,
        tolerance=allotted(policy, norm, jnp.where(dense, 0.0, e_total)),
        tail_mass=tail_mass,
        delta_max=delta_max,
        k_star=n_promoted,
        n_value_promoted=n_promoted,
        n_key_refined=n_finest,
        n_value_refined=n_values + n_finest,
        n_value_skipped=n_active - n_coarse - n_values - n_finest - n_promoted,
        rung=jnp.where(dense, 2 + of_head(verdict), jnp.where(n_promoted > 0, 2, 0)).astype(jnp.int32),
        ranking_ok=true,
        boundary_ok=true,
        canary_ok=passed,
        precondition_ok=true & sound[:, None, None] & jnp.isfinite(candidate_norm),
        bytes_read=jnp.where(first, read, 0.0),
        bytes_paged_in=jnp.where(first, paged * (4.0 * d), 0.0),
    )


def tier1_bytes(d: int, passes: Sequence[Reads]) -> jax.Array:
    """What a step reads and writes of tier 1: [H] float32."""
    weights = 8 * 2  # of a token, for a group of up to 4 query heads
    scanned = lv.TILE * (d + 5 + weights) + 30  # 8-bit keys, both scales, nu; the plan's annotations of the tile
    values, low = lv.TILE * (d // 2), lv.TILE * (d // 4)  # at 4 bits; 2 more
    fine = lv.TILE * (d + d // 2 + d // 2 + d // 4 + 5)  # 12-bit keys and 6-bit values, their scales and nu

    def by(counts, beside: int):
        refined = counts[:, lv.N_FINEST] + counts[:, lv.N_PROMOTED]
        read = counts[:, lv.N_COARSE] * float(values + beside) + counts[:, lv.N_VALUES] * float(values + low + beside)
        return read + refined * float(fine)

    first, *more = (x.counts for x in passes)
    return first[:, lv.ACTIVE] * float(scanned) + by(first, 0) + sum(by(x, lv.TILE * weights) for x in more)
