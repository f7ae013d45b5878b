"""RULER's frequent words extraction: the three most frequent of made-up words whose counts follow a power law.

Prompt, distribution and answer length are those of NVIDIA/RULER (scripts/data/synthetic/freq_words_extraction.py and
constants.py; arXiv:2404.06654). The word of rank k appears floor(n k^-2 / zeta(2)) times; rank 1 is the noise "...".
"""

from __future__ import annotations

import dataclasses
import math
import random
import string
from typing import Literal

from certjax.eval.tasks.base import Sample, Source, generator
from certjax.eval.tasks.fitting import fill

PROMPT = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
ANSWER_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
WORD_LENGTH = 6
TOKENS_A_WORD = 50  # of the context, for each word of the vocabulary
ZETA_2 = math.pi**2 / 6
SHORTEST = 74  # words; from here on each of the ranks 2 to 4 appears more often than the next


@dataclasses.dataclass(frozen=True)
class FrequentWords:
    """The answer is the words of ranks 2 to 4."""

    name: str = "fwe"
    max_new_tokens: int = 50
    metric: Literal["all", "part"] = "all"

    def sample(self, index: int, context: int, seed: int, source: Source) -> Sample:
        """See `Task.sample`."""
        rng = generator(self.name, context, seed, index)
        coded: dict[str, None] = {"...": None}
        while len(coded) < max(5, (context - self.max_new_tokens) // TOKENS_A_WORD):
            coded["".join(rng.choices(string.ascii_lowercase, k=WORD_LENGTH))] = None
        ranked, shuffle_seed = list(coded), rng.getrandbits(64)

        def build(n: int) -> str:
            text = [word for k, word in enumerate(ranked, 1) for _ in range(int(n / (k * k) / ZETA_2))]
            random.Random(shuffle_seed).shuffle(text)
            return PROMPT.format(context=" ".join(text))

        prompt = fill(self, context, source, ANSWER_PREFIX, build, SHORTEST)
        return Sample(prompt, ANSWER_PREFIX, tuple(ranked[1:4]))
