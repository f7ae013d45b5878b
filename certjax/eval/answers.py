"""Tasks that are answered in words: prompts of a `tasks.Task`, greedy continuations, the share of references found."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from certjax.errors import ContextLengthError
from certjax.eval import engine
from certjax.eval.modes import EvalMode
from certjax.eval.scoring import score
from certjax.eval.tasks.base import Sample, Source, Task
from certjax.eval.work import digest
from certjax.model import Model
from certjax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Questions:
    """Samples of one task and context; a `Work`.

    Attributes
    ----------
    maker
        The task.
    source
        Of `maker`'s samples.
    tokenizer, context_length
        Of the model.
    chat
        Put prompts through the model's chat template, the answer's prefix after it.
    """

    benchmark: str
    maker: Task
    context: int
    samples: Sequence[int]
    seed: int
    source: Source
    tokenizer: Tokenizer
    context_length: int
    chat: bool

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.maker.name

    @property
    def kin(self) -> Hashable:
        """See `Work`: a batch ends with its longest answer, so tasks keep to themselves."""
        return self.benchmark, self.task, self.context, self.chat

    def options(self) -> dict[str, Any]:
        """See `Work`."""
        task = {k: _content(v) if isinstance(v, Path) else v for k, v in vars(self.maker).items()}
        template = self.tokenizer.chat("") if self.chat else None
        return {"task": task, "text": digest(self.source.text), "template": template}

    def prepare(self, samples: Sequence[int]) -> list[tuple[Sample, list[int]]]:
        """See `Work`."""
        prepared = []
        for i in samples:
            sample = self.maker.sample(i, self.context, self.seed, self.source)
            ids = self.tokenizer.encode(prompt_of(sample, self.tokenizer if self.chat else None))
            if len(ids) + self.maker.max_new_tokens > self.context_length:
                raise ContextLengthError(
                    f"sample {i} of task {self.task} has {len(ids)} tokens; with {self.maker.max_new_tokens} new ones "
                    f"that is more than the model's context of {self.context_length}: choose a shorter one than "
                    f"{self.context}."
                )
            prepared.append((sample, ids))
        return prepared

    def prefill(self, model: Model, prepared: list[tuple[Sample, list[int]]]) -> engine.Prefilled:
        """See `Work`."""
        prompts = [ids for _, ids in prepared]
        needed = max(map(len, prompts)) + self.maker.max_new_tokens
        return engine.prefill(model, prompts, engine.capacity_for(max(self.context, needed)))

    def run(
        self, model: Model, mode: EvalMode, prepared: list[tuple[Sample, list[int]]], prefilled: engine.Prefilled
    ) -> list[dict[str, Any]]:
        """See `Work`."""
        answers = engine.answer(model, mode, prefilled, self.maker.max_new_tokens)
        outcomes = []
        for (sample, ids), answer in zip(prepared, answers, strict=True):
            prediction = self.tokenizer.decode(answer.tokens)
            outcomes.append({
                "prompt_tokens": len(ids),
                "new_tokens": len(answer.tokens),
                "score": score(prediction, sample.references, self.maker.metric),
                "prediction": prediction,
                "references": list(sample.references),
                "certificate": answer.certificate,
                "seconds": answer.seconds,
            })  # fmt: skip
        return outcomes


def prompt_of(sample: Sample, chat: Tokenizer | None) -> str:
    """The text a model continues: as it is, or as a user's message with the answer begun for the model."""
    if chat is None:
        return sample.prompt + sample.answer_prefix
    return chat.chat(sample.prompt) + sample.answer_prefix.lstrip()


def source_of(tokenizer: Tokenizer, text: str) -> Source:
    """A source that counts as the model's tokenizer does."""
    special = len(tokenizer.encode(""))
    return Source(count_tokens=lambda piece: len(tokenizer.encode(piece)) - special, text=text)


def _content(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
