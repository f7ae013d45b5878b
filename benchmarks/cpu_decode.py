"""Decode speed of every mode side by side: `python -m benchmarks.cpu_decode [--context 2048]`.

SmolLM2 on book text; after a warm-up every mode decodes the same number of tokens, several rounds interleaved
in one process. Prints milliseconds per token (median over rounds) and the ratio to dense.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics

import jax

import certjax
from certjax.eval.texts import corpus

MODES = {
    "dense": ("dense", None),
    "naive": ("naive", certjax.Policy.budget(0.05)),
    "certified/budget 0.05": ("certified", certjax.Policy.budget(0.05)),
    "certified/budget 0.02": ("certified", certjax.Policy.budget(0.02)),
    "certified/paper": ("certified", certjax.Policy.paper()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=2048, help="tokens at the end of decoding")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    model = certjax.load("smollm2")
    prompt = model.tokenizer.encode(corpus()["emma"])[2000 : 2000 + args.context - args.new_tokens]
    times: dict[str, list[float]] = {name: [] for name in MODES}
    summary = {}
    for turn in range(args.rounds + 1):
        for name, (mode, policy) in MODES.items():
            result = certjax.generate(model, prompt, max_new_tokens=args.new_tokens, mode=mode, policy=policy)
            report = result.report()
            summary[name] = report.certificate
            if turn:  # the first round compiles
                times[name].append(1e3 / report.decode_tokens_per_second)
    dense = statistics.median(times["dense"])
    rows = [
        {
            "mode": name,
            "ms_per_token": statistics.median(t),
            "over_dense": statistics.median(t) / dense,
            "certificate": summary[name],
        }
        for name, t in times.items()
    ]
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"jax {jax.__version__}, python {platform.python_version()}, {jax.devices()[0]}, context {args.context}, "
          f"{args.new_tokens} tokens, median of {args.rounds} rounds")  # fmt: skip
    print("| mode | ms a token | over dense | key / value blocks promoted a head | dense head-steps |")
    print("|---|---|---|---|---|")
    for row in rows:
        c = row["certificate"]
        extra = (
            f"{c['key_blocks_promoted_mean']:.1f} / {c['value_blocks_promoted_mean']:.1f} | "
            f"{(c['dense_head'] + c['dense_layer']) / c['head_steps']:.1%}" if c else "- | -"
        )  # fmt: skip
        print(f"| {row['mode']} | {row['ms_per_token']:.1f} | {row['over_dense']:.2f} | {extra} |")


if __name__ == "__main__":
    main()
