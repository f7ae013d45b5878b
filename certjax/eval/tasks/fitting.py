"""How much haystack fits: the size of a sample is found by counting the tokens of few candidates."""

from __future__ import annotations

from collections.abc import Callable

from certjax.errors import InvalidArgumentError
from certjax.eval.tasks.base import Source, Task

TEMPLATE_TOKENS = 64
"""Kept free in every context for a chat template."""

SLACK = 0.005
"""Share of the room that may stay empty: counting is what takes time."""


def fill(
    task: Task,
    context: int,
    source: Source,
    answer_prefix: str,
    build: Callable[[int], str],
    minimum: int,
    maximum: int | None = None,
) -> str:
    """The longest of the prompts `build(minimum)` to `build(maximum)` that fits into `context`.

    Parameters
    ----------
    task, context, source
        As in `Task.sample`.
    answer_prefix
        Of the sample.
    build
        Prompt with so many units of haystack.
    minimum, maximum
        Units, `context` at most by default.

    Raises
    ------
    InvalidArgumentError
        If the shortest prompt does not fit.
    """
    taken = task.max_new_tokens + TEMPLATE_TOKENS + source.count_tokens(answer_prefix)
    shortest = source.count_tokens(build(minimum))
    if taken + shortest > context:
        raise InvalidArgumentError(
            f"task {task.name!r} does not fit into a context of {context} tokens: this sample takes {taken + shortest} "
            f"({task.max_new_tokens} for the answer, {TEMPLATE_TOKENS} for a chat template); choose a longer context."
        )
    return longest(build, source.count_tokens, context - taken, minimum, maximum or max(minimum, context))


def longest(build: Callable[[int], str], count: Callable[[str], int], room: int, minimum: int, maximum: int) -> str:
    """The longest text `build(n)`, minimum <= n <= maximum, of at most `room` tokens; `build(minimum)` if none is.

    `count(build(n))` grows with n, nearly in proportion, so that the next n is a line through two known ones. It ends
    with less than a unit, or less than SLACK, to spare.
    """
    low, best = minimum, build(minimum)
    first = used = count(best)
    high, over = maximum + 1, None
    rate, spare = first / minimum, 1.0  # tokens a unit, too high while it holds the fixed part as well
    while high - low > 1 and room - used >= max(spare, SLACK * room):
        # Counts of nearly the same text may be equal, or fall.
        n = min(low + max(1, int((room - used) / rate) if rate > 0 else (high - low) // 2), high - 1)
        text = build(n)
        tokens = count(text)
        if tokens <= room:
            low, used, best = n, tokens, text
        else:
            high, over = n, tokens
        rate = spare = (used - first) / (low - minimum) if over is None else (over - used) / (high - low)
    return best
