"""Rows of the benchmarks as Markdown."""

from __future__ import annotations

from typing import Any


def _table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def attention_table(rows: list[dict[str, Any]]) -> str:
    """Microseconds a call, ratios to the best dense implementation, and what was read."""
    header = [
        "context", "batch", "workload", "back end", "dense us", "naive us", "certified us p50 / p95 / p99",
        "planned anew us", "naive / dense", "certified / dense", "device MB read", "host MB read",
        "tiles skipped, finest, promoted", "rungs 0-4", "memory / dense",
    ]  # fmt: skip
    return _table(
        header,
        [
            [
                r["context"], r["batch"], r["workload"], r["backend"],
                ", ".join(f"{name} {x['p50']:.0f}" for name, x in r["dense_us"].items()),
                f"{r['naive_us']['p50']:.0f}",
                " / ".join(f"{r['certified_us'][p]:.0f}" for p in ("p50", "p95", "p99")),
                f"{r['planned_anew_us']['p50']:.0f}" if r["planned_anew_us"] else "", r["naive_over_dense"],
                r["certified_over_dense"], f"{r['bytes_read'] / 1e6:.1f}",
                f"{r['bytes_paged_in'] / 1e6:.2f}",
                ", ".join(f"{r[f'tiles_{x}']:.1f}" for x in ("skipped", "finest", "promoted")),
                " ".join(map(str, r["rungs"])), r["device_bytes_over_dense"],
            ]
            for r in rows
        ],
    )  # fmt: skip


def step_table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds a step."""
    header = [
        "context", "batch", "workload", "back end", "without attention ms", "dense ms", "dense mode ms", "naive ms",
        "certified ms p50 / p95 / p99", "planned anew ms", "naive / dense", "certified / dense", "host MB read",
        "rungs 0-4", "memory / dense",
    ]  # fmt: skip

    def p50(row, name: str):
        """Of what a quick run leaves out: nothing."""
        return row[name]["p50"] if name in row else ""

    return _table(
        header,
        [
            [
                r["context"], r["batch"], r["workload"], r["backend"], r["without attention"]["p50"], r["dense"],
                p50(r, "dense mode"), p50(r, "naive"),
                " / ".join(str(r["certified"][p]) for p in ("p50", "p95", "p99")),
                p50(r, "certified, planned anew"), r.get("naive_over_dense", ""), r["certified_over_dense"],
                r["paged_in_MB_a_step, certified"], " ".join(map(str, r["rungs, certified"])),
                r["device_bytes_over_dense"],
            ]
            for r in rows
        ],
    )  # fmt: skip
