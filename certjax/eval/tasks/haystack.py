"""What haystacks and needles are made of.

After NVIDIA/RULER (scripts/data/synthetic, arXiv:2404.06654), except that essays are a passage of `Source.text` that
begins at a random sentence (Paul Graham's essays from the first word, there), and that a sentence ends where a simple
rule says so (NLTK's tokenizer, there).
"""

from __future__ import annotations

import functools
import random
import re
import uuid
from collections.abc import Callable, Iterable

from certjax.errors import InvalidArgumentError

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

SENTENCE_END = re.compile(r"[.!?][\"'”’)\]_]*$")
ABBREVIATIONS = frozenset(
    {"Mr.", "Mrs.", "Ms.", "Dr.", "Col.", "Capt.", "St.", "Esq.", "Messrs.", "Rev.", "Sr.", "Jr."}
)


class Fresh:
    """Draws that never repeat within a sample: `numbers` of seven digits, `words` (adjective-noun) or `uuids`."""

    def __init__(self, rng: random.Random):
        self._rng = rng
        self._taken: set[str] = set()

    def draw(self, kind: str) -> str:
        """A string not drawn before."""
        draw: Callable[[], str] = getattr(self, f"_{kind}")
        while (drawn := draw()) in self._taken:
            pass
        self._taken.add(drawn)
        return drawn

    def _numbers(self) -> str:
        return str(self._rng.randint(1_000_000, 9_999_999))

    def _words(self) -> str:
        return f"{self._rng.choice(words('adjective'))}-{self._rng.choice(words('noun'))}"

    def _uuids(self) -> str:
        return str(uuid.UUID(int=self._rng.getrandbits(128), version=4))


@functools.cache
def words(*parts: str) -> list[str]:
    """English words of the given parts of speech ("noun", "adjective", "verb"), sorted: those of `wonderwords`."""
    try:
        import wonderwords
    except ImportError as error:
        raise InvalidArgumentError(
            'the words of this task come from the package wonderwords: pip install "certjax[eval]".'
        ) from error
    return wonderwords.RandomWord(enhanced_prefixes=False).filter(include_categories=parts)


class Essay:
    """A passage of running text, from a random sentence on; past the end it goes on at the beginning."""

    def __init__(self, text: str, rng: random.Random):
        self._words, starts = _segment(text)
        self._starts = frozenset(starts)
        self._begin = rng.choice(starts) if starts else 0

    def sentences(self, n_words: int) -> list[str]:
        """The passage's first `n_words` words.

        Raises
        ------
        InvalidArgumentError
            If the text has fewer.
        """
        total = len(self._words)
        if n_words > total:
            raise InvalidArgumentError(
                f"the haystack's text has {total} words, this context needs {n_words}; pass a longer text."
            )
        sentences: list[list[str]] = []
        for position in range(self._begin, self._begin + n_words):
            if not sentences or position % total in self._starts:
                sentences.append([])
            sentences[-1].append(self._words[position % total])
        return [" ".join(sentence) for sentence in sentences]


@functools.lru_cache(maxsize=2)
def _segment(text: str) -> tuple[list[str], list[int]]:
    """Words, and the positions of those that begin a sentence."""
    found = text.split()
    ends = [bool(SENTENCE_END.search(word)) and word not in ABBREVIATIONS for word in found]
    return found, [i for i in range(len(found)) if i == 0 or ends[i - 1]]


def insert(units: list[str], needles: Iterable[tuple[float, str]]) -> list[str]:
    """`units` with each needle before the unit at its depth, a share of the units in [0, 1]."""
    result: list[str] = []
    done = 0
    for depth, needle in sorted(needles, key=lambda pair: pair[0]):
        position = int(len(units) * depth)
        result += [*units[done:position], needle]
        done = position
    return result + units[done:]
