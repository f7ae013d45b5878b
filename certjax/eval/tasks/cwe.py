"""RULER's common words extraction: the ten words that appear most often in a numbered list.

Prompt, worked example, frequencies and answer length are those of NVIDIA/RULER (scripts/data/synthetic/
common_words_extraction.py and constants.py; arXiv:2404.06654). What differs: there is one list of words, that of
`wonderwords`, and a context that it does not fill (beyond some 150,000 tokens) stays unfilled; RULER has a second list.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Literal

from certjax.eval.tasks.base import Sample, Source, generator
from certjax.eval.tasks.fitting import fill
from certjax.eval.tasks.haystack import words

PROMPT = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
)
ANSWER_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
N_COMMON = 10
LONG_CONTEXT = 4096


@dataclasses.dataclass(frozen=True)
class CommonWords:
    """Common words appear 30 times and others 3 times; 6 times and once in contexts below 4,096."""

    name: str = "cwe"
    max_new_tokens: int = 120
    metric: Literal["all", "part"] = "all"

    def sample(self, index: int, context: int, seed: int, source: Source) -> Sample:
        """See `Task.sample`."""
        rng = generator(self.name, context, seed, index)
        vocabulary = words("noun", "adjective", "verb")
        if context < LONG_CONTEXT:
            shown, asked = _List(rng, vocabulary, 3, 1), _List(rng, vocabulary, 6, 1)
            n_shown = 20
        else:
            shown, asked = _List(rng, vocabulary, 10, 3), _List(rng, vocabulary, 30, 3)
            n_shown = 40
        example = f"{shown.prompt(n_shown)}{ANSWER_PREFIX} {_numbered(shown.common)}\n"
        prompt = fill(
            self,
            context,
            source,
            ANSWER_PREFIX,
            lambda n: example + asked.prompt(n),
            minimum=N_COMMON + 1,
            maximum=len(vocabulary),
        )
        return Sample(prompt, ANSWER_PREFIX, tuple(asked.common))


class _List:
    def __init__(self, rng: random.Random, vocabulary: list[str], often: int, seldom: int):
        self._words = rng.sample(vocabulary, len(vocabulary))
        self._often, self._seldom = often, seldom
        self._seed = rng.getrandbits(64)
        self.common = self._words[:N_COMMON]

    def prompt(self, n_words: int) -> str:
        entries = self.common * self._often + self._words[N_COMMON:n_words] * self._seldom
        random.Random(self._seed).shuffle(entries)
        return PROMPT.format(context=_numbered(entries))


def _numbered(entries: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(entries, 1))
