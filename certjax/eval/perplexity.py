"""Perplexity of running text: windows of the context's length, the first half prefilled, the second teacher-forced.

Every scored token is predicted by a decode step, through the mode's own cache: the last token of the first half is held
back from the prefill and fed as the first step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
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
    """

    task: str
    context: int
    samples: Sequence[int]
    tokens: Sequence[int]
    begin: Sequence[int]
    benchmark: str = "ppl"

    def options(self) -> dict[str, Any]:
        """See `Work`."""
        return {"tokens": digest(" ".join(map(str, self.tokens))), "begin": list(self.begin)}

    def prepare(self, samples: Sequence[int]) -> list[list[int]]:
        """See `Work`."""
        size = self.context - len(self.begin)
        return [[*self.begin, *self.tokens[i * size : (i + 1) * size]] for i in samples]

    def prefill(self, model: Model, prepared: list[list[int]]) -> engine.Prefilled:
        """See `Work`."""
        held = self.context // 2 - 1
        return engine.prefill(model, [ids[:held] for ids in prepared], engine.capacity_for(self.context))

    def run(
        self, model: Model, mode: EvalMode, prepared: list[list[int]], prefilled: engine.Prefilled
    ) -> list[dict[str, Any]]:
        """See `Work`."""
        half = self.context // 2
        scored = engine.score(
            model, mode, prefilled, [ids[half - 1 : -1] for ids in prepared], [ids[half:] for ids in prepared]
        )
        return [
            {
                "prompt_tokens": half,
                "new_tokens": len(of.nll),
                "token_nll": of.nll,
                "token_bound": of.bound,
                "certificate": of.certificate,
                "seconds": of.seconds,
            }
            for of in scored
        ]


def windows(
    model: Model, texts: Mapping[str, str], contexts: Sequence[int], per_text: int
) -> list[Windows]:
    """Up to `per_text` windows of every text and context, spread evenly. Texts shorter than a window are left out.

    Raises
    ------
    InvalidArgumentError
        If a context is too short, or no text is as long as one.
    """
    begin = model.tokenizer.encode("")
    tokens = {title: model.tokenizer.encode(text)[len(begin) :] for title, text in texts.items()}
    work = []
    for context in contexts:
        if context < SHORTEST:
            raise InvalidArgumentError(f"context {context} is too short for perplexity; {SHORTEST} is the least.")
        found = []
        for title, ids in tokens.items():
            there = len(ids) // (context - len(begin))
            samples = [i * there // per_text for i in range(per_text)] if there > per_text else range(there)
            if samples:
                found.append(Windows(title, context, samples, ids, begin))
        if not found:
            longest = max(map(len, tokens.values()))
            raise InvalidArgumentError(f"no text has a window of {context} tokens; the longest has {longest}.")
        work += found
    return work
