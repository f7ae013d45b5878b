"""What a task hands to the evaluation: prompts with the answers that are looked for in the continuation."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Literal, Protocol


@dataclasses.dataclass(frozen=True)
class Sample:
    """One prompt.

    Attributes
    ----------
    prompt
        Context and question, without a chat template.
    answer_prefix
        What the answer begins with: the end of a base model's prompt, the beginning of a chat model's answer.
    references
        Strings to find in the continuation.
    """

    prompt: str
    answer_prefix: str
    references: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """What samples are made of.

    Attributes
    ----------
    count_tokens
        Tokens of a text, special tokens not included.
    text
        Running text for haystacks, long enough for the largest context.
    """

    count_tokens: Callable[[str], int]
    text: str


class Task(Protocol):
    """A benchmark task. Samples depend on `(name, context, seed, index)` and the source alone."""

    name: str
    max_new_tokens: int
    metric: Literal["all", "part"]  # see `scoring`

    def sample(self, index: int, context: int, seed: int, source: Source) -> Sample:
        """Prompt, answer prefix and `max_new_tokens` fit into `context` tokens, with 64 more for a chat template."""
        ...


def generator(name: str, context: int, seed: int, index: int) -> random.Random:
    """Random numbers of one sample, the same on every machine and version of Python."""
    return random.Random(f"{name}/{context}/{seed}/{index}")
