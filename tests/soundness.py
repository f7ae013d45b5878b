"""Soundness by force: `python -m tests.soundness --head-steps 1000000`.

Certifies adversarial inputs and compares every bound with the true error against float64 attention over
the originals. Exit status 1 on a single violation.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import itertools
import sys
import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress

from certjax import Policy, TieredKVCache, certified_attention
from certjax.fused import dispatch
from pallas_kernels import levels as lv
from tests import adversarial as adv
from tests.interpreter import of_mosaic
from tests.oracle import exact_error

SLACK_OF_THE_ORACLE = 1e-13
"""Relative rounding of the float64 reference, in units of the largest value."""


@functools.partial(jax.jit, static_argnames="policy")
def cached(keys, values, lengths, policy: Policy, guess):
    cache = TieredKVCache.from_prefill(keys, values, policy, lengths=lengths, capacity=keys.shape[2])
    if cache.plan is not None:
        cache = cache.replace(plan=guessed(guess, cache.plan.shape, cache.head_dim))
    return cache


def certify_by_steps(q, keys, values, lengths, policy: Policy, guess=0):
    return certified_attention(q, cached(keys, values, lengths, policy, guess), policy)


certify = jax.jit(certify_by_steps, static_argnames="policy")


def guessed(guess, shape, d: int):
    """What a plan of the step before may say: every third time nothing yet, otherwise anything a plan says, or any
    number at all."""
    a, b = jax.random.split(jax.random.key(guess))
    level = jax.random.randint(a, shape, 0, lv.PROMOTED + 1)
    pieces = jax.random.randint(b, shape, 1, lv.every_piece(d) + 1)
    words = jnp.where(level == lv.PROMOTED, lv.word(level, pieces), level)
    words = jnp.where(guess % 3 == 1, words, jax.random.randint(b, shape, 0, 2**16)).astype(jnp.uint16)
    return jnp.where(guess % 3 == 0, lv.initial_plan(shape), words)


def check(inputs, policy: Policy) -> dict[str, np.ndarray]:
    """True error, bound and record of every head-step of one draw; leaves `[b, Hq]`."""
    guess = zlib.crc32(np.asarray(inputs[0], np.float32).tobytes()) >> 1  # of the draw, and nothing else
    out, record = jax.device_get(certify(*inputs, policy=policy, guess=guess))
    error = exact_error(out, *inputs)
    scale = np.abs(np.asarray(inputs[2], np.float64)).max()
    error = np.maximum(error - SLACK_OF_THE_ORACLE * scale, 0.0)
    budget_kept = (record.e_total <= record.tolerance) | (record.rung >= 3)
    return {
        "error": error,
        "bound": record.e_total,
        "violation": ~(error <= record.e_total),
        "contract": ~budget_kept,
        "rung": record.rung,
        "centred": record.e_key_candidate + record.e_val_candidate,
        "paper": record.e_key_paper_candidate + record.e_val_paper_candidate,
        "canary": ~record.canary_ok,
    }


EVERYTHING = dict.fromkeys(adv.POLICIES, tuple(adv.DTYPES))


def cases(seed: int, policies: Mapping[str, Sequence[str]]):
    """Endless draws: every pair of families, scales, dtypes and policies, in random order."""
    rng = np.random.default_rng(seed)
    names = list(adv.FAMILIES)
    for policy in itertools.cycle(policies):
        choice = (
            rng.choice(names), rng.choice(names), rng.choice(adv.QUERY_SCALES), rng.choice(adv.DATA_SCALES),
            rng.choice(adv.DATA_SCALES), rng.choice(policies[policy]),
        )  # fmt: skip
        yield policy, choice, adv.draw(rng, adv.POLICIES[policy], *choice)


def run(
    head_steps: int,
    seed: int = 0,
    progress: bool = True,
    policies: Mapping[str, Sequence[str]] = EVERYTHING,
    *,
    threads: int = 1,
    minutes: float = float("inf"),
) -> collections.Counter:
    """Check at least `head_steps` head-steps of `policies` in their dtypes, or as many as `minutes` allow; returns
    counts and prints tightness quantiles. `threads` share the policies: on a GPU most of the time goes into
    compilation."""
    totals, ratios, centred = collections.Counter(), [], []
    lock, end = threading.Lock(), time.monotonic() + 60 * minutes

    def work(first: int) -> None:
        own = {name: policies[name] for name in list(policies)[first::threads]}
        for policy, choice, inputs in cases(seed + first, own):
            result = check(inputs, adv.POLICIES[policy])
            with lock:
                count(policy, choice, result)
                if totals["head_steps"] >= head_steps or time.monotonic() > end:
                    break

    def count(policy: str, choice: tuple, result: dict[str, np.ndarray]) -> None:
        n = result["error"].size
        totals["head_steps"] += n
        totals["violations"] += int(result["violation"].sum())
        totals["contract_broken"] += int(result["contract"].sum())
        totals["canary_alarms"] += int(result["canary"].sum())
        totals.update({f"rung_{r}": int((result["rung"] == r).sum()) for r in range(5)})
        totals[policy] += n
        if result["violation"].any() or result["contract"].any():
            worst = np.nanargmax(result["error"] / result["bound"])
            print(policy, choice, "error", result["error"].flat[worst], "bound", result["bound"].flat[worst])
        seen = (result["error"] > 0) & (result["rung"] < 3) & np.isfinite(result["bound"])
        ratios.append((result["bound"] / np.maximum(result["error"], 1e-300))[seen])
        seen &= np.isfinite(result["paper"]) & (result["paper"] > 0)
        centred.append((result["centred"] / np.where(seen, result["paper"], 1.0))[seen])
        bar.update(task, advance=n)

    with Progress(disable=not progress) as bar, ThreadPoolExecutor(threads) as pool:
        task = bar.add_task("head-steps", total=head_steps)
        list(pool.map(work, range(threads)))
    for label, sample in (("bound / true error", ratios), ("centred / paper", centred)):
        values = np.concatenate(sample)
        values = values[np.isfinite(values)]
        if values.size:
            low, *q = np.quantile(values, [0.0, 0.1, 0.5, 0.9])
            print(
                f"{label}: min {low:.3g}  p10 {q[0]:.3g}  median {q[1]:.3g}  p90 {q[2]:.3g}  ({values.size} head-steps)"
            )
    return totals


def interpret_chain(all_in_triton: bool) -> None:
    """Let fused policies run by the chain's kernels in place of twins: those between the big steps in Triton's
    interpreter, and all that a plan asks for in Mosaic's, where this JAX has one; or all in Triton's."""
    import tests.conftest  # noqa: F401, tells Triton to interpret

    if all_in_triton:
        dispatch.reference_kernels = functools.partial(dispatch.triton_kernels, n_heads=4, processors=8)
        return
    plain, more, interpreter = dispatch.reference_kernels, {}, of_mosaic()
    if interpreter is None:
        print("Mosaic's kernels: their twins, as this JAX cannot interpret them.")
    else:
        from pallas_kernels.scan.dealing import MOST_AHEAD
        from pallas_kernels.scan.mosaic import scan_and_fine

        one = functools.partial(scan_and_fine, splits=4, refiners=2, readers=3, interpret=interpreter)
        compiled, one_at_a_time = jax.jit(one), threading.Lock()

        def interpreted(*operands, fine):  # which takes nothing from host memory, and is no part of another program
            operands, fine = jax.tree.map(np.asarray, (operands, fine))
            with one_at_a_time:
                return jax.block_until_ready(compiled(*operands, fine=fine))

        more = dict(scan_and_fine=interpreted, uneven=MOST_AHEAD)
        globals().update(certify=certify_by_steps)
    dispatch.reference_kernels = lambda: dataclasses.replace(plain(), chained=True, **more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policies", default=",".join(adv.POLICIES), help="comma separated; default: all")
    parser.add_argument("--threads", type=int, default=1, help="share the policies; default: 1")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument(
        "--chain", action="store_true", help="without a GPU: fused policies by the chain's kernels, interpreted"
    )
    parser.add_argument(
        "--triton", action="store_true", help="the big steps in Triton, too, as on GPUs other than Hopper's"
    )
    args = parser.parse_args()
    if args.chain:
        if jax.default_backend() == "gpu":
            parser.error("--chain is for machines without a GPU; this one's runs the compiled kernels, leave it out.")
        interpret_chain(args.triton)
    elif args.triton:
        if jax.default_backend() != "gpu":
            parser.error("--triton needs a GPU, or --chain, which interprets its kernels.")
        for name, policy in adv.POLICIES.items():
            if policy.backend == "mosaic_gpu":
                adv.POLICIES[name] = dataclasses.replace(policy, backend="triton")
    names = args.policies.split(",")
    if unknown := [name for name in names if name not in adv.POLICIES]:
        parser.error(f"--policies: unknown {', '.join(unknown)}; choose from {', '.join(adv.POLICIES)}.")
    if not 1 <= args.threads <= len(names):
        parser.error(f"--threads must be from 1 to the number of policies, {len(names)}; got {args.threads}.")
    chosen = {name: EVERYTHING[name] for name in names}
    totals = run(args.head_steps, args.seed, policies=chosen, threads=args.threads, minutes=args.minutes)
    print(dict(totals))
    sys.exit(1 if totals["violations"] or totals["contract_broken"] else 0)


if __name__ == "__main__":
    main()
