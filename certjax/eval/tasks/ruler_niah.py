"""RULER's needles in a haystack: magic numbers, or UUIDs, of words hidden in an essay, in noise or among each other.

Prompts, parameters and answer length are those of NVIDIA/RULER (scripts/synthetic.yaml, scripts/data/synthetic/niah.py
and constants.py; arXiv:2404.06654). What differs: see `haystack`; keys and values never repeat within a sample.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from certjax.eval.tasks.base import Sample, Source, generator
from certjax.eval.tasks.fitting import fill
from certjax.eval.tasks.haystack import NOISE, Essay, Fresh, insert

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What is the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text is",
)
SEVERAL = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text are",
)
DEPTHS = [round(100 * i / 39) / 100 for i in range(40)]
SHORTEST = {"essay": 200, "noise": 5, "needle": 5}  # words, or lines


@dataclasses.dataclass(frozen=True)
class RulerNiah:
    """One of VARIANTS.

    Attributes
    ----------
    name
        RULER's.
    haystack
        "essay": running text; "noise": the same line again and again; "needle": needles of other keys.
    keys, values
        What a key and a value look like: "words", "numbers" or "uuids".
    n_keys, n_values, n_queries
        Keys hidden, values of each, and keys asked for.
    """

    name: str
    haystack: Literal["essay", "noise", "needle"] = "essay"
    keys: Literal["words", "numbers", "uuids"] = "words"
    values: Literal["words", "numbers", "uuids"] = "numbers"
    n_keys: int = 1
    n_values: int = 1
    n_queries: int = 1
    max_new_tokens: int = 128
    metric: Literal["all", "part"] = "all"

    def sample(self, index: int, context: int, seed: int, source: Source) -> Sample:
        """See `Task.sample`."""
        rng = generator(self.name, context, seed, index)
        fresh = Fresh(rng)
        hidden = {
            fresh.draw(self.keys): [fresh.draw(self.values) for _ in range(self.n_values)]
            for _ in range(max(self.n_keys, self.n_queries))
        }
        needles = [self._needle(key, value) for key, values in hidden.items() for value in values]
        rng.shuffle(needles)
        essay = Essay(source.text, rng) if self.haystack == "essay" else None
        depths = rng.sample(DEPTHS, len(needles)) if essay else [rng.random() for _ in needles]
        asked = rng.sample(list(hidden), self.n_queries)
        query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        one = self.n_queries * self.n_values == 1
        template, prefix = ONE if one else SEVERAL
        kind = self.values.removesuffix("s") if one else self.values
        answer_prefix = prefix.format(kind=kind, query=query)
        others: list[str] = []

        def build(n: int) -> str:
            if essay:
                text = " ".join(insert(essay.sentences(n), zip(depths, needles, strict=True)))
            else:
                while self.haystack == "needle" and len(others) < n:
                    others.append(self._needle(fresh.draw(self.keys), fresh.draw(self.values)))
                lines = others[:n] if self.haystack == "needle" else [NOISE] * n
                text = "\n".join(insert(lines, zip(depths, needles, strict=True)))
            return template.format(kind=kind, context=text, query=query)

        prompt = fill(self, context, source, answer_prefix, build, SHORTEST[self.haystack])
        return Sample(prompt, answer_prefix, tuple(value for key in asked for value in hidden[key]))

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.values, key=key, value=value)


VARIANTS: dict[str, dict[str, Any]] = {
    "niah_single_1": {"haystack": "noise"},
    "niah_single_2": {},
    "niah_single_3": {"values": "uuids"},
    "niah_multikey_1": {"n_keys": 4},
    "niah_multikey_2": {"haystack": "needle"},
    "niah_multikey_3": {"haystack": "needle", "keys": "uuids", "values": "uuids"},
    "niah_multivalue": {"n_values": 4},
    "niah_multiquery": {"n_queries": 4},
}
"""RULER's eight, by name."""
