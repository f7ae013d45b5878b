"""RULER's variable tracking: which variables hold a value that is handed on from one to the next?

Prompt, worked example, parameters and answer length are those of NVIDIA/RULER (scripts/data/synthetic/
variable_tracking.py and constants.py; arXiv:2404.06654). What differs: names never repeat within a sample, the example
is drawn anew for each, and the answer prefix does not end in a space (nor does lm-evaluation-harness's): to most
tokenizers the space belongs to the word that follows.
"""

from __future__ import annotations

import dataclasses
import random
import string
from typing import Literal

from certjax.eval.tasks.base import Sample, Source, generator
from certjax.eval.tasks.fitting import fill, longest
from certjax.eval.tasks.haystack import NOISE, insert

PROMPT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above."
)
ANSWER_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, "
    "{n} variables are assigned the value {value}, they are:"
)
EXAMPLE_TOKENS = 500
SHORTEST = 5  # lines of noise


@dataclasses.dataclass(frozen=True)
class VariableTracking:
    """Chains of `n_hops + 1` variables; the question is about the first chain, further ones distract."""

    name: str = "vt"
    n_chains: int = 1
    n_hops: int = 4
    max_new_tokens: int = 30
    metric: Literal["all", "part"] = "all"

    def sample(self, index: int, context: int, seed: int, source: Source) -> Sample:
        """See `Task.sample`."""
        rng = generator(self.name, context, seed, index)
        shown = _Puzzle(rng, self.n_chains, self.n_hops, n_letters=3)
        question = longest(
            lambda n: shown.prompt(n) + shown.answer_prefix,
            source.count_tokens,
            room=EXAMPLE_TOKENS,
            minimum=SHORTEST,
            maximum=EXAMPLE_TOKENS,
        )
        example = f"{question} {' '.join(shown.answer)}\n\n"
        asked = _Puzzle(rng, self.n_chains, self.n_hops, n_letters=5)
        prompt = fill(self, context, source, asked.answer_prefix, lambda n: example + asked.prompt(n), SHORTEST)
        return Sample(prompt, asked.answer_prefix, tuple(asked.answer))


class _Puzzle:
    def __init__(self, rng: random.Random, n_chains: int, n_hops: int, n_letters: int):
        names: dict[str, None] = {}
        while len(names) < n_chains * (n_hops + 1):
            names["".join(rng.choices(string.ascii_uppercase, k=n_letters))] = None
        chains = [list(names)[i::n_chains] for i in range(n_chains)]
        values = rng.sample(range(10_000, 100_000), n_chains)
        self.answer, self.value = chains[0], values[0]
        self.answer_prefix = ANSWER_PREFIX.format(n=n_hops + 1, value=self.value)
        self._assignments: list[tuple[float, str]] = []
        for chain, value in zip(chains, values, strict=True):
            lines = [f"VAR {chain[0]} = {value}"]
            lines += [f"VAR {new} = VAR {old} " for old, new in zip(chain, chain[1:], strict=False)]
            depths = sorted(rng.random() for _ in lines)
            self._assignments += zip(depths, lines, strict=True)

    def prompt(self, n_noise: int) -> str:
        context = "\n".join(insert([NOISE] * n_noise, self._assignments))
        return PROMPT.format(context=context, value=self.value)
