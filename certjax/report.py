"""The summary of a generation: for people (a table) and for machines (a dict)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from certjax.generate import Generation

QUANTILES = (0.5, 0.9, 0.99, 1.0)


@dataclasses.dataclass(frozen=True)
class Report:
    """Numbers of one `generate` call. `certificate` is None where the mode certifies nothing."""

    mode: str
    policy: dict[str, Any]
    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float
    decode_tokens_per_second: float
    cache_bytes: dict[str, int]
    host_memory_kind: str | None
    certificate: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, ready for JSON."""
        return dataclasses.asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the table."""
        rows = [
            ("mode", self.mode + (f" / {self.policy['kind']}" if self.certificate else "")),
            ("tokens", f"{self.prompt_tokens} prompt + {self.new_tokens} new"),
            ("first token", f"{self.first_token_seconds:.2f} s (with compilation)"),
            ("decode", f"{self.decode_tokens_per_second:.1f} tokens/s"),
        ]
        for tier, size in self.cache_bytes.items():
            where = f" ({self.host_memory_kind})" if tier == "tier2" and self.host_memory_kind else ""
            rows.append((f"KV bytes, {tier}", f"{size:,}{where}"))
        if self.certificate:
            rows += _certificate_rows(self.certificate)
        return rows

    def __str__(self) -> str:
        width = max(len(label) for label, _ in self.rows())
        return "\n".join(f"{label:<{width}}  {value}" for label, value in self.rows())


def summarize(generation: Generation) -> Report:
    """Reduce a generation's telemetry to a `Report`."""
    new_tokens = sum(len(t) for t in generation.tokens)
    steps = int(generation.telemetry.valid.sum())
    return Report(
        mode=generation.mode,
        policy=dataclasses.asdict(generation.policy),
        prompt_tokens=sum(generation.prompt_lengths),
        new_tokens=new_tokens,
        first_token_seconds=generation.first_token_seconds,
        decode_tokens_per_second=steps / generation.decode_seconds if steps else 0.0,
        cache_bytes=generation.cache_bytes,
        host_memory_kind=generation.host_memory_kind,
        certificate=_certificate_summary(generation) if generation.mode == "certified" and steps else None,
    )


def _certificate_summary(generation: Generation) -> dict[str, Any]:
    record, valid = generation.telemetry.certificate, generation.telemetry.valid  # [T, L, b, Hq], [T, b]
    keep = np.broadcast_to(valid[:, None, :, None], record.rung.shape)
    # The scale tolerances are relative to: the norm of the layer's concatenated heads over sqrt(Hq).
    scale = np.broadcast_to(np.sqrt((record.out_norm**2).mean(-1, keepdims=True)), record.rung.shape)

    def of(name):
        return getattr(record, name)[keep]

    rung, total = of("rung"), of("e_total")
    relative = total / scale[keep]
    within = (total <= of("tolerance")) | (rung >= 3)
    steps = int(valid.any(1).sum())
    return {
        "head_steps": int(keep.sum()),
        "promoted": int(((rung == 1) | (rung == 2) | ((rung < 3) & (of("k_star") > 0))).sum()),
        "dense_head": int((rung == 3).sum()),
        "dense_layer": int((rung == 4).sum()),
        "within_tolerance_or_dense": float(within.mean()),
        "e_total_over_layer_norm": _quantiles(relative),
        "e_total_candidate_over_layer_norm": _quantiles(of("e_total_candidate") / scale[keep]),
        "key_blocks_promoted_mean": float(of("k_star").mean()),
        "value_blocks_promoted_mean": float(of("n_value_promoted").mean()),
        "key_blocks_refined_mean": float(of("n_key_refined").mean()),
        "value_blocks_refined_mean": float(of("n_value_refined").mean()),
        "value_blocks_skipped_mean": float(of("n_value_skipped").mean()),
        "bytes_read_per_step": float(of("bytes_read").sum() / steps),
        "bytes_paged_in_per_step": float(of("bytes_paged_in").sum() / steps),
        "checks_failed": {
            name: int((~of(f"{name}_ok")).sum()) for name in ("ranking", "boundary", "canary", "precondition")
        },
    }


def _quantiles(x: np.ndarray) -> dict[str, float]:
    return {f"p{q * 100:g}": float(np.quantile(x, q)) for q in QUANTILES}


def _certificate_rows(c: dict[str, Any]) -> list[tuple[str, str]]:
    n = c["head_steps"]

    def share(count):
        return f"{count:,} ({count / n:.1%})"

    def spread(quantiles):
        return "  ".join(f"{k} {v:.2e}" for k, v in quantiles.items())

    return [
        ("head-steps", f"{n:,}"),
        ("  promoted", share(c["promoted"])),
        ("  dense, head (rung 3)", share(c["dense_head"])),
        ("  dense, layer (rung 4)", share(c["dense_layer"])),
        ("  in tolerance or dense", f"{c['within_tolerance_or_dense']:.1%}"),
        ("bound / layer norm", spread(c["e_total_over_layer_norm"])),
        ("  before rungs 3-4", spread(c["e_total_candidate_over_layer_norm"])),
        (
            "promoted blocks a head",
            f"{c['key_blocks_promoted_mean']:.1f} key, {c['value_blocks_promoted_mean']:.1f} value",
        ),
        (
            "refined blocks a head",
            f"{c['key_blocks_refined_mean']:.1f} key, {c['value_blocks_refined_mean']:.1f} value; "
            f"values of {c['value_blocks_skipped_mean']:.1f} not read",
        ),
        (
            "bytes a step",
            f"{c['bytes_read_per_step']:,.0f} read on the device, {c['bytes_paged_in_per_step']:,.0f} paged in",
        ),
        ("checks failed", ", ".join(f"{k} {v}" for k, v in c["checks_failed"].items())),
    ]
