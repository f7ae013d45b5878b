"""Does certified decoding say what dense decoding says? `python -m benchmarks.same_text [--tolerance 0.02]`.

Twenty prompts (chat questions, and passages of novels long enough that tier 1 carries most of the context), greedy,
the same in both modes; prints each comparison and the certificate's totals. Exit status 1 on a difference.
"""

from __future__ import annotations

import argparse
import json
import sys

import certjax
from certjax.eval.texts import NOVELS, corpus

QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "Write one sentence about the sea.",
    "What is 12 plus 30?",
    "Who wrote Romeo and Juliet?",
    "Explain what a neural network is in two sentences.",
    "List the days of the week.",
    "Give a recipe for tea.",
)
COUNTS = ("head_steps", "promoted", "dense_head", "dense_layer", "within_tolerance_or_dense")
PASSAGES = tuple((title, start, length) for title in NOVELS for start, length in ((3000, 700), (20000, 1400)))


def prompts(model: certjax.Model) -> list[tuple[str, list[int]]]:
    """Label and token ids of each of the twenty."""
    chat = [(q, model.tokenizer.encode(model.tokenizer.chat(q))) for q in QUESTIONS]
    novels = corpus()
    books = [
        (f"{title}, {length} tokens from {start}", model.tokenizer.encode(novels[title])[start : start + length])
        for title, start, length in PASSAGES
    ]
    return chat + books


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    model = certjax.load("smollm2")
    policy = certjax.Policy.budget(args.tolerance)
    rows = []
    for label, ids in prompts(model):
        texts, report = {}, None
        for mode in ("dense", "naive", "certified"):
            result = certjax.generate(model, ids, mode=mode, policy=policy, max_new_tokens=args.max_new_tokens)
            texts[mode] = result.text[0]
            report = result.report().certificate or report
        rows.append({
            "prompt": label,
            "tokens": len(ids),
            "certified_equals_dense": texts["certified"] == texts["dense"],
            "naive_equals_dense": texts["naive"] == texts["dense"],
            "text": texts,
            **{k: report[k] for k in COUNTS},
        })  # fmt: skip
        if not args.json:
            r, n = rows[-1], rows[-1]["head_steps"]
            print(f"{'same' if r['certified_equals_dense'] else 'DIFFERENT':9} promoted {r['promoted'] / n:6.1%}"
                  f"  dense {(r['dense_head'] + r['dense_layer']) / n:6.1%}  naive "
                  f"{'same' if r['naive_equals_dense'] else 'different':9}  {label}", flush=True)  # fmt: skip
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        def total(name):
            return sum(r[name] for r in rows)

        print(f"certified = dense on {total('certified_equals_dense')} of {len(rows)} prompts (naive: "
              f"{total('naive_equals_dense')}); {total('head_steps'):,} head-steps, {total('promoted'):,} promoted, "
              f"{total('dense_head') + total('dense_layer'):,} dense")  # fmt: skip
    sys.exit(not all(r["certified_equals_dense"] for r in rows))


if __name__ == "__main__":
    main()
