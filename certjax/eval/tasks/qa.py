"""RULER's question answering: a question whose documents are hidden among other documents.

Prompt and answer length are those of NVIDIA/RULER (scripts/data/synthetic/qa.py and constants.py; arXiv:2404.06654).
The questions come from a file of the user's: `dev-v2.0.json` of SQuAD 2.0 (qa_1) or `hotpot_dev_distractor_v1.json` of
HotpotQA (qa_2). What differs: questions come in an order drawn from the seed (in that of the file, there), and no
document is repeated to fill a context.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from pathlib import Path
from typing import Literal

from certjax.errors import InvalidArgumentError
from certjax.eval.tasks.base import Sample, Source, generator
from certjax.eval.tasks.fitting import fill

INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
PROMPT = (
    f"{INSTRUCTION}\n\nThe following are given documents.\n\n{{context}}\n\n{INSTRUCTION}\n\nQuestion: {{question}}"
)
ANSWER_PREFIX = " Answer:"
FILES = {"squad": "dev-v2.0.json of SQuAD 2.0", "hotpotqa": "hotpot_dev_distractor_v1.json of HotpotQA"}


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, its accepted answers, and documents by number: its own, and others on the same matter."""

    text: str
    answers: tuple[str, ...]
    own: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Qa:
    """Questions of one file.

    Attributes
    ----------
    path
        The file.
    dataset
        Its format: "squad" or "hotpotqa".
    """

    name: str
    path: Path
    dataset: Literal["squad", "hotpotqa"]
    max_new_tokens: int = 32
    metric: Literal["all", "part"] = "part"

    def sample(self, index: int, context: int, seed: int, source: Source) -> Sample:
        """See `Task.sample`; `source.text` is not used.

        Raises
        ------
        InvalidArgumentError
            Also if the file cannot be read.
        """
        questions, documents = _read(Path(self.path), self.dataset)
        rng = generator(self.name, context, seed, index)
        question = questions[_order(self.name, seed, len(questions))[index % len(questions)]]
        near = [*question.own, *rng.sample(question.related, len(question.related))]
        others = rng.sample(range(len(documents)), min(len(documents), context))
        candidates = near + [number for number in others if number not in near]
        places = [rng.random() for _ in candidates]

        def build(n: int) -> str:
            chosen = sorted(range(n), key=lambda i: places[i])
            listed = [f"Document {i}:\n{documents[candidates[j]]}" for i, j in enumerate(chosen, 1)]
            return PROMPT.format(context="\n\n".join(listed), question=question.text)

        prompt = fill(self, context, source, ANSWER_PREFIX, build, len(question.own), len(candidates))
        return Sample(prompt, ANSWER_PREFIX, question.answers)


@functools.lru_cache(maxsize=4)
def _order(name: str, seed: int, n: int) -> list[int]:
    return random.Random(f"{name}/{seed}").sample(range(n), n)


@functools.lru_cache(maxsize=2)
def _read(path: Path, dataset: str) -> tuple[list[Question], list[str]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        questions, documents = _squad(data) if dataset == "squad" else _hotpotqa(data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidArgumentError(
            f"{path} cannot be read as {dataset} questions ({error!r}); pass {FILES[dataset]}."
        ) from error
    if not questions:
        raise InvalidArgumentError(f"{path} holds no question that has an answer; pass {FILES[dataset]}.")
    return questions, documents


def _squad(data: dict) -> tuple[list[Question], list[str]]:
    articles = [article["paragraphs"] for article in data["data"]]
    documents = sorted({paragraph["context"] for article in articles for paragraph in article})
    number = {document: i for i, document in enumerate(documents)}
    questions = []
    for article in articles:
        numbers = dict.fromkeys(number[paragraph["context"]] for paragraph in article)
        for paragraph in article:
            own = number[paragraph["context"]]
            related = tuple(i for i in numbers if i != own)
            for qa in paragraph["qas"]:
                if not qa["is_impossible"]:
                    answers = tuple(dict.fromkeys(answer["text"] for answer in qa["answers"]))
                    questions.append(Question(qa["question"], answers, (own,), related))
    return questions, documents


def _hotpotqa(data: list) -> tuple[list[Question], list[str]]:
    contexts = [[f"{title}\n{''.join(sentences)}" for title, sentences in entry["context"]] for entry in data]
    documents = sorted({document for context in contexts for document in context})
    number = {document: i for i, document in enumerate(documents)}
    questions = [
        Question(entry["question"], (entry["answer"],), tuple(dict.fromkeys(number[d] for d in context)))
        for entry, context in zip(data, contexts, strict=True)
    ]
    return questions, documents
