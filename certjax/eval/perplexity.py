"""Perplexity of running text: windows of the context's length, the first half prefilled, the second teacher-forced; or
more of it prefilled, and as many tokens scored as are asked for.

Every scored token is predicted by a decode step, through the mode's own cache: the last token before the first of them
is held back from the prefill and fed as the first step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from certjax.errors import InvalidArgumentError
from certjax.eval import engine
from certjax.eval.modes import EvalMode
from certjax.eval.work import digest
from certjax.model import Model

SHORTEST = 16
"""Tokens of the smallest window."""


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Windows of one text; a `Work`. Window i holds tokens `i * context` and on, after the tokens of `begin`.

    Attributes
    ----------
    task
        Title of the text.
    tokens
        The text's ids, special tokens not included.
    begin
        What every window begins with: the beginning-of-sequence token, where the model wants one.
    scored
        Tokens at the end of a window that are scored; None for half of them.
    """

    task: str
    context: int
    samples: Sequence[int]
    tokens: Sequence[int]
    begin: Sequence[int]
    scored: int | None = None
    benchmark: str = "ppl"

    @property
    def kin(self) -> Hashable:
        """See `Work`."""
        return self.benchmark, self.context, self._given

    @property
    def _given(self) -> int:
        """Tokens of a window that are not scored."""
        return self.context // 2 if self.scored is None else self.context - self.scored

    def options(self) -> dict[str, Any]:
        """See `Work`."""
        options = {"tokens": digest(" ".join(map(str, self.tokens))), "begin": list(self.begin)}
        return options if self.scored is None else {**options, "scored": self.scored}

    def prepare(self, samples: Sequence[int]) -> list[list[int]]:
        """See `Work`."""
        size = self.context - len(self.begin)
        return [[*self.begin, *self.tokens[i * size : (i + 1) * size]] for i in samples]

    def prefill(self, model: Model, prepared: list[list[int]]) -> engine.Prefilled:
        """See `Work`."""
        held = self._given - 1
        return engine.prefill(model, [ids[:held] for ids in prepared], engine.capacity_for(self.context))

    def run(
        self, model: Model, mode: EvalMode, prepared: list[list[int]], prefilled: engine.Prefilled
    ) -> list[dict[str, Any]]:
        """See `Work`."""
        given = self._given
        scored = engine.score(
            model, mode, prefilled, [ids[given - 1 : -1] for ids in prepared], [ids[given:] for ids in prepared]
        )
        return [
            {
                "prompt_tokens": given,
                "new_tokens": len(of.nll),
                "token_nll": of.nll,
                "token_bound": of.bound,
                "certificate": of.certificate,
                "seconds": of.seconds,
            }
            for of in scored
        ]


def windows(
    model: Model, texts: Mapping[str, str], contexts: Sequence[int], per_text: int, scored: int | None = None
) -> list[Windows]:
    """Up to `per_text` windows of every text and context, spread evenly. Texts shorter than a window are left out.

    `scored` tokens at the end of each window are scored, half of the window by default.

    Raises
    ------
    InvalidArgumentError
        If a context is too short, leaves nothing before the tokens to score, or no text is as long as one.
    """
    begin = model.tokenizer.encode("")
    tokens = {title: model.tokenizer.encode(text)[len(begin) :] for title, text in texts.items()}
    work = []
    for context in contexts:
        if context < SHORTEST:
            raise InvalidArgumentError(f"context {context} is too short for perplexity; {SHORTEST} is the least.")
        if scored is not None and not 0 < scored <= context - 2:
            raise InvalidArgumentError(
                f"{scored} tokens of a window of {context} cannot be scored; from 1 to {context - 2} can."
            )
        found = []
        for title, ids in tokens.items():
            there = len(ids) // (context - len(begin))
            samples = [i * there // per_text for i in range(per_text)] if there > per_text else range(there)
            if samples:
                found.append(Windows(title, context, samples, ids, begin, scored))
        if not found:
            longest = max(map(len, tokens.values()))
            raise InvalidArgumentError(f"no text has a window of {context} tokens; the longest has {longest}.")
        work += found
    return work
