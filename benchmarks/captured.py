"""Soundness and tightness on real activations: `python -m benchmarks.captured`.

SmolLM2 reads 4,096 tokens of a novel; the queries of the last positions, all layers and heads, are certified
under several policies and every bound is compared with the true error against float64 attention over the
originals. Exit status 1 on a violation, or on a head-step that breaks the budget policy's contract.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

import certjax
from certjax.audit import exact
from certjax.capture import Captured, capture
from certjax.eval.texts import NOVELS, corpus

PLAIN = dict(codec="int8_int4", annotations="bfloat16", spectral=False)
POLICIES = {
    "paper": certjax.Policy.paper(),
    "paper, windows": certjax.Policy.paper(sink_tokens=16, recent_tokens=128),
    "observe, int8_int4": certjax.Policy.observe(**PLAIN),
    "observe": certjax.Policy.observe(),
    "budget 0.02": certjax.Policy.budget(0.02),
    "budget 0.05": certjax.Policy.budget(0.05),
    "budget 0.10": certjax.Policy.budget(0.10),
    "budget 0.05, equal": certjax.Policy.budget(0.05, allotment="equal"),
    "budget 0.05, int8_int4": certjax.Policy.budget(0.05, **PLAIN),
}


@functools.partial(jax.jit, static_argnames="policy")
def certify(q, keys, values, length, policy):
    """`q`: [L, Hq, d], keys/values: [L, 1, Hkv, N, d]; certificate leaves [L, Hq]."""

    def layer(x):
        q, k, v = x
        cache = certjax.TieredKVCache.from_prefill(k, v, policy, lengths=length[None], capacity=k.shape[-2])
        out, record = certjax.certified_attention(q[None], cache, policy)
        return jax.tree.map(lambda x: x[0], (out, record))

    return jax.lax.map(layer, (q, keys, values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--novel", choices=NOVELS, default="emma")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--queries", type=int, default=8, help="positions, spread over the last 256")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    model = certjax.load("smollm2")
    tokens = model.tokenizer.encode(corpus()[args.novel])[: args.tokens]
    seen = capture(model, tokens, n_queries=256)
    picked = np.linspace(0, 255, args.queries).astype(int)
    positions = [seen.positions[i] for i in picked]
    seen = Captured(q=seen.q[:, picked], keys=seen.keys, values=seen.values)
    truth = exact(seen, positions)  # [P, L, Hq, d]
    rows = []
    for name, policy in track(POLICIES.items(), "policies", disable=args.json):
        outs, records = [], []
        for i, position in enumerate(positions):
            length = jnp.int32(position + 1)
            out, record = jax.device_get(certify(seen.q[:, i], seen.keys, seen.values, length, policy))
            outs.append(np.linalg.norm(out.astype(np.float64) - truth[i], axis=-1))
            records.append(record)
        record = jax.tree.map(lambda *x: np.stack(x), *records)  # [P, L, Hq]
        rows.append({"policy": name, **_summary(policy, np.stack(outs), record, truth)})
    failed = any(row["violations"] or row["contract_broken"] for row in rows)
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        _print(rows, args)
    sys.exit(failed)


def _summary(policy, error, record, truth) -> dict:
    norm = np.linalg.norm(truth, axis=-1)
    layer = np.sqrt((norm**2).mean(-1, keepdims=True))
    quantized = record.rung < 3
    ratio = (record.e_total / np.maximum(error, 1e-30))[quantized]
    centred = record.e_key_candidate + record.e_val_candidate
    paper = record.e_key_paper_candidate + record.e_val_paper_candidate

    def q(x, *at):
        return [float(v) for v in np.quantile(x, at)] if x.size else [float("nan")] * len(at)

    broken = ~((record.e_total <= record.tolerance) | ~quantized) if policy.kind == "budget" else np.zeros(1, bool)
    return {
        "head_steps": int(error.size),
        "violations": int((~(error <= record.e_total)).sum()),
        "contract_broken": int(broken.sum()),
        "bound_over_error_p1_p50_p90": q(ratio, 0.01, 0.5, 0.9),
        "e_total_over_layer_p50_p90": q(record.e_total / layer, 0.5, 0.9),
        "candidate_over_layer_p50_p90": q(record.e_total_candidate / layer, 0.5, 0.9),
        "e_arith_over_layer_p50": q(record.e_arith_candidate / layer, 0.5)[0],
        "e_key_over_head_p50_p90_p99": q(record.e_key_candidate / norm, 0.5, 0.9, 0.99),
        "e_val_over_head_p50_p90_p99": q(record.e_val_candidate / norm, 0.5, 0.9, 0.99),
        "error_over_layer_p50_p90": q(error / layer, 0.5, 0.9),
        "centred_over_paper_p50_p90": q((centred / np.maximum(paper, 1e-30))[paper > 0], 0.5, 0.9),
        "promoted_blocks_mean": float((record.k_star + record.n_value_promoted).mean()),
        "k_star_p50_p90": q(record.k_star.astype(float), 0.5, 0.9),
        "dense_share": float((~quantized).mean()),
        "checks_failed": int((~(record.canary_ok & record.precondition_ok)).sum()),
    }


def _print(rows, args) -> None:
    print(f"jax {jax.__version__}, {jax.devices()[0]}, SmolLM2, {args.tokens} tokens of {args.novel}, "
          f"{args.queries} positions, all layers and heads")  # fmt: skip
    head = ["policy", "head-steps", "violations", "contract broken", "bound/error p1, p50, p90",
            "E_total/layer p50, p90", "before rungs 3-4 p50, p90", "E_arith/layer p50",
            "true error/layer p50, p90", "centred/paper p50, p90",
            "promoted blocks", "dense"]  # fmt: skip
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for r in rows:
        def f(name):
            return ", ".join(f"{x:.2g}" for x in r[name])  # noqa: B023

        print(f"| {r['policy']} | {r['head_steps']} | {r['violations']} | {r['contract_broken']} | "
              f"{f('bound_over_error_p1_p50_p90')} | {f('e_total_over_layer_p50_p90')} | "
              f"{f('candidate_over_layer_p50_p90')} | {r['e_arith_over_layer_p50']:.1e} | "
              f"{f('error_over_layer_p50_p90')} | {f('centred_over_paper_p50_p90')} | "
              f"{r['promoted_blocks_mean']:.1f} | {r['dense_share']:.1%} |")  # fmt: skip


if __name__ == "__main__":
    main()
