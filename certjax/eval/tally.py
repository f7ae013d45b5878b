"""Certificates reduced inside the decode loop: what a record says of them, in memory that does not grow with the heads
of every step. Stored as they are, the certificates of 4,096 steps of a model of 135M parameters take 130 MB."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from certjax.certificate import Certificate
from certjax.eval.records import CertificateSummary
from certjax.models.llama.config import LlamaConfig
from certjax.plugs import Mode

_SUMS = ("bound", "before", "layer", "paper")
"""Relative bounds of a step: each has a sum and a maximum, over heads and layers ("layer": over layers)."""
_SERIES = (
    *(f"{name}_sum" for name in _SUMS), *(f"{name}_max" for name in _SUMS), "read", "paged", "failed",
    *(f"rung{i}" for i in range(5)),
)  # fmt: skip


@struct.dataclass
class Tally:
    """A `decode.Recorder`. `series` and `heads` are None in dense mode.

    Attributes
    ----------
    series : `[T, b, S]` float32
        S numbers a step and sequence, in the order of `_SERIES`.
    heads : `[3, L, b, Hq]` float32
        Sums over steps: bounds before heads went dense, steps that were dense, blocks promoted.
    alive : `[T, b]` bool
        Steps that count.
    """

    series: jax.Array | None
    heads: jax.Array | None
    alive: jax.Array

    @classmethod
    def empty(cls, config: LlamaConfig, mode: Mode, batch: int, max_steps: int) -> Tally:
        """As `decode.Recorder`."""
        alive = jnp.zeros((max_steps, batch), bool)
        if mode != "certified":
            return cls(None, None, alive)
        series = jnp.zeros((max_steps, batch, len(_SERIES)))
        return cls(series, jnp.zeros((3, config.n_layers, batch, config.n_heads)), alive)

    def add(self, records: Certificate | None, alive: jax.Array, at: jax.Array) -> Tally:
        """As `decode.Recorder`."""
        kept = lax.dynamic_update_index_in_dim(self.alive, alive, at, 0)
        if records is None:
            return self.replace(alive=kept)
        of = _relative(records)
        dense, promoted = records.rung >= 3, records.k_star + records.n_value_promoted
        failed = ~(records.ranking_ok & records.boundary_ok & records.canary_ok & records.precondition_ok)
        counts = (records.bytes_read, records.bytes_paged_in, failed, *(records.rung == i for i in range(5)))
        everything = [
            *(x.sum((0, 2)) for x in of.values()),
            *(x.max((0, 2)) for x in of.values()),
            *(x.astype(jnp.float32).sum((0, 2)) for x in counts),
        ]
        heads = jnp.stack([x.astype(jnp.float32) for x in (of["before"], dense, promoted)])
        return Tally(
            series=lax.dynamic_update_index_in_dim(self.series, jnp.stack(everything, -1), at, 0),
            heads=self.heads + jnp.where(alive[:, None], heads, 0.0),
            alive=kept,
        )


def _relative(records: Certificate) -> dict[str, jax.Array]:
    """Bounds over the layer's norm, `[L, b, Hq]` ("layer": `[L, b, 1]`). What is undefined is infinite."""
    # Scaled, so that no square overflows or vanishes.
    unit = jnp.clip(records.out_norm.max(-1, keepdims=True), 2.0**-100, 2.0**100)
    norm = jnp.sqrt(jnp.square(records.out_norm / unit).mean(-1, keepdims=True)) * unit

    def over_norm(e):
        ratio = jnp.where(e == 0, 0.0, e / norm)
        return jnp.where(jnp.isnan(ratio), jnp.inf, ratio)

    before = over_norm(records.e_total_candidate)
    largest = jnp.clip(before.max(-1, keepdims=True), 2.0**-100, 2.0**100)
    return {
        "bound": over_norm(records.e_total),
        "before": before,
        "layer": jnp.sqrt(jnp.square(before / largest).mean(-1, keepdims=True)) * largest,
        "paper": over_norm(records.e_key_paper_candidate + records.e_val_paper_candidate),
    }


def summaries(tally: Tally, config: LlamaConfig, prompt_lengths: list[int]) -> list[CertificateSummary | None]:
    """Of each sequence; None in dense mode. All zeros where no step was taken."""
    tally = jax.tree.map(np.asarray, tally)
    if tally.series is None:
        return [None] * len(prompt_lengths)
    return [_summary(tally, config, row, n) for row, n in enumerate(prompt_lengths)]


def step_bounds(tally: Tally) -> list[list[float] | None]:
    """Of each sequence, the largest bound of each step before heads went dense; None in dense mode."""
    alive = np.asarray(tally.alive)
    if tally.series is None:
        return [None] * alive.shape[1]
    largest = np.asarray(tally.series)[..., _SERIES.index("before_max")]
    return [largest[alive[:, row], row].tolist() for row in range(alive.shape[1])]


def _summary(tally: Tally, config: LlamaConfig, row: int, prompt_length: int) -> CertificateSummary:
    series = tally.series[tally.alive[:, row], row].astype(np.float64)  # [n, S]
    n = len(series)
    of = dict(zip(_SERIES, series.T, strict=True))
    layer_steps, steps = max(n * config.n_layers, 1), max(n, 1)
    head_steps = layer_steps * config.n_heads

    def total(name):
        return float(of[name].sum())

    def largest(name):
        return float(of[name].max(initial=0.0))

    # Step i attends to the prompt and i + 1 tokens.
    token = 2 * config.n_layers * config.n_kv_heads * config.head_dim * jnp.dtype(config.kv_dtype).itemsize
    by_head = [(x[:, row].astype(np.float64) / steps).tolist() for x in tally.heads]
    return CertificateSummary(
        head_steps=n * config.n_layers * config.n_heads,
        rungs=[int(total(f"rung{i}")) for i in range(5)],
        bound_mean=total("bound_sum") / head_steps,
        bound_max=largest("bound_max"),
        before_mean=total("before_sum") / head_steps,
        before_max=largest("before_max"),
        before_layer_mean=total("layer_sum") / layer_steps,
        before_layer_max=largest("layer_max"),
        before_paper_mean=total("paper_sum") / head_steps,
        before_paper_max=largest("paper_max"),
        bytes_read=total("read") / steps,
        bytes_paged_in=total("paged") / steps,
        bytes_dense=token * (prompt_length + (n + 1) / 2) if n else 0.0,
        checks_failed=int(total("failed")),
        bound_by_head=by_head[0],
        dense_by_head=by_head[1],
        promoted_by_head=by_head[2],
    )
