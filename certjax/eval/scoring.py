"""RULER's metrics: is the answer in the continuation?

`string_match_all` and `string_match_part` of https://github.com/NVIDIA/RULER (scripts/eval), of one sample and between
0 and 1; there, scores are means over samples, times 100. lm-evaluation-harness 0.4.13 scores "all" the same. Its "part"
is the share of the references found: less than RULER's where a question accepts several answers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from certjax.errors import InvalidArgumentError

METRICS = ("all", "part")


def cleaned(prediction: str) -> str:
    """A continuation as it is compared: control characters become newlines, surrounding space goes."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip()


def score(prediction: str, references: Sequence[str], metric: Literal["all", "part"] = "all") -> float:
    """Score of a continuation; case is ignored.

    Parameters
    ----------
    prediction
        The continuation, as the model wrote it.
    references
        Strings to find.
    metric
        "all": the share of the references found. "part": 1 if any of them is found, else 0.

    Raises
    ------
    InvalidArgumentError
        If the metric is unknown, or there are no references.
    """
    if metric not in METRICS:
        raise InvalidArgumentError(f"unknown metric {metric!r}; choose one of {', '.join(METRICS)}.")
    if not references:
        raise InvalidArgumentError("no references: a sample is scored by at least one string to find.")
    text = cleaned(prediction).lower()
    found = [reference.lower() in text for reference in references]
    return sum(found) / len(found) if metric == "all" else float(any(found))
