"""Ten needles in a book: at depths 0, 0.1 .. 0.9, asked for all at once (`niah`) or one at a time (`niah_each`).

A trial is one context. It passes when all ten needles are found: one sample of `niah` that scores 1, or ten samples of
`niah_each` in a row (10 t to 10 t + 9, which share their context) that all do.

Needle and question are worded nearly as RULER's (see `ruler_niah`). Keys are common nouns. The answer to all ten is
begun in the needle's own words, with the first key asked for. Of the forms tried, SmolLM2-135M-Instruct followed this
one best, and still it often ends after the first number: models of that size are to be asked with `niah_each`.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Literal

from certjax.eval.tasks.base import Sample, Source, generator
from certjax.eval.tasks.fitting import fill
from certjax.eval.tasks.haystack import Essay, Fresh, insert, words

N_NEEDLES = 10
NEEDLE = "The special magic number for {key} is {value}."
INSTRUCTION = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
    "I will quiz you about the numbers afterwards.\n{context}\n"
)
ALL = "What are all the special magic numbers for {keys} mentioned in the provided text?"
ALL_PREFIX = " The special magic number for {key} is"
EACH = "What is the special magic number for {key} mentioned in the provided text?"
EACH_PREFIX = " The special magic number for {key} mentioned in the provided text is"
SHORTEST = 200  # words


@dataclasses.dataclass(frozen=True)
class AllNeedles:
    """All ten in one answer."""

    name: str = "niah"
    max_new_tokens: int = 256
    metric: Literal["all", "part"] = "all"

    def sample(self, index: int, context: int, seed: int, source: Source) -> Sample:
        """See `Task.sample`."""
        trial = _Trial(generator(self.name, context, seed, index), source)
        asked = trial.rng.sample(trial.keys, N_NEEDLES)
        question = ALL.format(keys=f"{', '.join(asked[:-1])}, and {asked[-1]}")
        prefix = ALL_PREFIX.format(key=asked[0])
        prompt = fill(self, context, source, prefix, lambda n: trial.text(n) + question, SHORTEST)
        return Sample(prompt, prefix, tuple(trial.values[key] for key in asked))


@dataclasses.dataclass(frozen=True)
class EachNeedle:
    """Sample `i` asks for the needle at depth `i % 10 / 10` of trial `i // 10`."""

    name: str = "niah_each"
    max_new_tokens: int = 32
    metric: Literal["all", "part"] = "all"

    def sample(self, index: int, context: int, seed: int, source: Source) -> Sample:
        """See `Task.sample`."""
        number, needle = divmod(index, N_NEEDLES)
        trial = _Trial(generator(self.name, context, seed, number), source)
        question, prefix = EACH.format, EACH_PREFIX.format
        # The longest key decides how much text fits, so that the trial's ten samples share their context.
        longest = max(trial.keys, key=lambda key: source.count_tokens(f" {key}"))
        widest = question(key=longest)
        prompt = fill(self, context, source, prefix(key=longest), lambda n: trial.text(n) + widest, SHORTEST)
        key = trial.keys[needle]
        return Sample(prompt.removesuffix(widest) + question(key=key), prefix(key=key), (trial.values[key],))


class _Trial:
    """Keys in the order of their depths, the value of each, and the text they are hidden in."""

    def __init__(self, rng: random.Random, source: Source):
        fresh = Fresh(rng)
        self.rng = rng
        self.keys = rng.sample([noun for noun in words("noun") if noun.isalpha() and noun.islower()], N_NEEDLES)
        self.values = {key: fresh.draw("numbers") for key in self.keys}
        self._essay = Essay(source.text, rng)

    def text(self, n_words: int) -> str:
        needles = [
            (i / N_NEEDLES, NEEDLE.format(key=key, value=value)) for i, (key, value) in enumerate(self.values.items())
        ]
        return INSTRUCTION.format(context=" ".join(insert(self._essay.sentences(n_words), needles)))
