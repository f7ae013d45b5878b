"""Is the paper preset what it was? `python -m benchmarks.same_bits COMMIT`.

Certifies the tests' ordinary problem with the paper preset and two variants, in both dtypes, here and in a checkout of
COMMIT, and compares codes, outputs and certificates bit by bit. Exit status 1 on a difference.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).parents[1]
CODES = ("k_codes", "k_scale", "k_zero", "v_codes", "v_scale", "v_zero")


def dump(file: str) -> None:
    """Everything that the preset computes, by name."""
    from certjax import Policy
    from tests import problems

    policies = {
        "paper": Policy.paper(),
        "float16 metadata": Policy.paper(key_metadata="float16"),
        "windows": Policy.paper(sink_tokens=16, recent_tokens=64),
    }
    arrays = {}
    for dtype in ("float16", "bfloat16"):
        q, *_ = problems.originals(jnp.dtype(dtype))
        for name, policy in policies.items():
            cache = problems.cache(policy, jnp.dtype(dtype))
            out, record = problems.certify(q, cache, policy)
            fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
            codes = {code: np.asarray(getattr(cache.codes, code)).view(np.uint8) for code in CODES}
            arrays |= {f"{dtype}, {name}, {k}": np.asarray(x) for k, x in {"out": out, **fields, **codes}.items()}
    np.savez(file, **arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit", nargs="?", help="compare with this commit")
    parser.add_argument("--dump", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.dump:
        dump(args.dump)
        return
    with tempfile.TemporaryDirectory() as scratch:
        before = Path(scratch) / "before"
        subprocess.run(["git", "worktree", "add", "--detach", before, args.commit], cwd=ROOT, check=True)
        try:
            stored = []
            for name, tree in (("then", before), ("now", ROOT)):
                stored.append(f"{scratch}/{name}.npz")
                environment = {**os.environ, "PYTHONPATH": str(tree)}
                command = [sys.executable, __file__, "--dump", stored[-1]]
                subprocess.run(command, cwd=tree, env=environment, check=True)
            then, now = (dict(np.load(file)) for file in stored)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", before], cwd=ROOT, check=True)
    different = [k for k in then if not np.array_equal(then[k], now.get(k))]
    print(f"{len(then)} arrays compared, {len(different)} differ", *different, sep="\n  ")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
