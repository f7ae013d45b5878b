"""The contract between a benchmark and the runner: samples that are prefilled together and then run in every mode."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

from certjax.eval.modes import EvalMode
from certjax.model import Model


class Work(Protocol):
    """Samples of one benchmark, task and context.

    Attributes
    ----------
    benchmark, task, context
        As in a `Record`.
    samples
        Numbers of the samples.
    """

    benchmark: str
    task: str
    context: int
    samples: Sequence[int]

    def options(self) -> dict[str, Any]:
        """What outcomes depend on beside model, mode, context, sample and seed: plain types."""
        ...

    @property
    def kin(self) -> Hashable:
        """Works of which this is equal share batches: what one has prepared, another can prefill and run."""
        ...

    def prepare(self, samples: Sequence[int]) -> list[Any]:
        """Token ids of each sample, and whatever `run` needs beside them.

        Raises
        ------
        InvalidArgumentError
            If a sample does not fit the model's context.
        """
        ...

    def prefill(self, model: Model, prepared: list[Any]) -> Any:
        """What all modes start from."""
        ...

    def run(self, model: Model, mode: EvalMode, prepared: list[Any], prefilled: Any) -> list[dict[str, Any]]:
        """Fields of a `Record` that depend on the outcome, of each sample."""
        ...


def digest(text: str) -> str:
    """Sixteen hexadecimal digits that stand for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
