"""lm-evaluation-harness drives certjax as a model, so that its tasks run unchanged in any mode.

    python -m certjax.eval.harness run --model certjax --model_args model=smollm2,mode=budget --tasks lambada_openai

takes the arguments of `lm_eval`. In `mode` a semicolon stands for a comma: `mode=budget:tolerance=0.02;refine=false`.
Every token that a task scores is predicted by a decode step, through the mode's own cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from certjax.errors import CertjaxError, InvalidArgumentError
from certjax.eval import engine
from certjax.eval.modes import parse_mode
from certjax.generate import bucket
from certjax.model import Model, load

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise CertjaxError("certjax.eval.harness needs lm-evaluation-harness; run pip install lm_eval.") from error

TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model("certjax")
class CertjaxLM(TemplateLM):
    """A model of lm-evaluation-harness.

    Parameters
    ----------
    model
        As for `certjax.load`, or a `Model`.
    mode
        As for `certjax eval --mode`.
    kv_dtype
        As for `certjax.load`.
    max_length
        Tokens of a prompt and its answer; the model's context by default. Prompts that are longer lose their beginning.
    max_gen_toks
        New tokens where a task does not say.
    batch_size
        Requests that run together.
    device, max_batch_size
        Not used; the harness passes them.

    Raises
    ------
    InvalidArgumentError
        If the mode does not fit the model, or the model has no tokenizer.
    """

    def __init__(
        self,
        model: str | Model = "smollm2",
        mode: str = "budget",
        kv_dtype: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        self.mode = parse_mode(mode.replace(";", ","))
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise InvalidArgumentError(f"batch_size must be a whole number of at least 1, got {batch_size!r}.")
        self.batch_size = int(batch_size)
        self.model = model if isinstance(model, Model) else load(model, kv_dtype=kv_dtype)
        if self.model.tokenizer is None:
            raise InvalidArgumentError(f"model {self.model.name} has no tokenizer; convert it again.")
        self.max_length = int(max_length or self.model.config.context_length)
        self.max_gen_toks = int(max_gen_toks)
        engine.check_fit(self.model, self.mode, self.max_length)

    # -- tokens ---------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The first end-of-sequence id; without one, that of `prefix_token_id`."""
        config = self.model.config
        return config.eos_token_ids[0] if config.eos_token_ids else config.bos_token_id or 0

    @property
    def prefix_token_id(self) -> int:
        """What a text without context begins after: the beginning-of-sequence token where the model wants one."""
        begin = self.model.tokenizer.encode("")
        return begin[0] if begin else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Ids, with a beginning-of-sequence token where the model wants one, unless `add_special_tokens` is False."""
        ids, begin = self.model.tokenizer.encode(string), self.model.tokenizer.encode("")
        return ids[len(begin) :] if add_special_tokens is False else ids

    @property
    def tokenizer_name(self) -> str:
        """Name of the model."""
        return self.model.name.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A prompt for the model's turn; without `add_generation_prompt`, for the rest of the last message."""
        if add_generation_prompt:
            return self.model.tokenizer.chat(chat_history)
        return self.model.tokenizer.chat(chat_history[:-1]) + chat_history[-1]["content"]

    def get_model_info(self) -> dict[str, Any]:
        """For the harness' results: the mode and its policy."""
        return {"certjax_mode": self.mode.label, "certjax_policy": self.mode.to_dict()["policy"]}

    # -- requests -------------------------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests: Sequence[tuple], disable_tqdm: bool = False, **kwargs) -> list:
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        results: list[tuple[float, bool] | None] = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: -(len(rows[i].held) + len(rows[i].fed)))
        for chosen in self._batches(order, disable_tqdm):
            for i, result in zip(chosen, self._score([rows[i] for i in chosen]), strict=True):
                results[i] = result
        for (key, *_), result in zip(requests, results, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in disjoint windows of `max_length`."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (of, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += of
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, each up to the first of its stop strings.

        Raises
        ------
        InvalidArgumentError
            If a request asks for sampling, or for more tokens than fit.
        """
        wanted = [_settings(request.args[1], self.max_gen_toks) for request in requests]
        texts: list[str | None] = [None] * len(requests)
        for settings in dict.fromkeys(wanted):
            mine = [i for i, other in enumerate(wanted) if other == settings]
            prompts = {i: self._prompt(requests[i].args[0], settings[1]) for i in mine}
            for chosen in self._batches(sorted(mine, key=lambda i: -len(prompts[i])), disable_tqdm):
                answers = self._continue([prompts[i] for i in chosen], *settings)
                for i, text in zip(chosen, answers, strict=True):
                    texts[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return texts

    # -- how ------------------------------------------------------------------------------------------

    def _batches(self, order: list[int], quiet: bool) -> Iterator[list[int]]:
        size = self.batch_size
        chunks = [order[i : i + size] for i in range(0, len(order), size)]
        return track(chunks, f"certjax {self.mode.label}", console=Console(stderr=True), disable=quiet, transient=True)

    def _padded(self, rows: list) -> list:
        """A full batch, so that its programs are compiled once."""
        return rows + rows[-1:] * (self.batch_size - len(rows))

    def _row(self, context: list[int], continuation: list[int]) -> _Row:
        if not 0 < len(continuation) <= self.max_length:
            raise InvalidArgumentError(
                f"a continuation has {len(continuation)} tokens; from 1 to max_length={self.max_length} can be scored."
            )
        room = max(1, self.max_length + 1 - len(continuation))
        return _Row(context[-room:], continuation)

    def _score(self, rows: list[_Row]) -> list[tuple[float, bool]]:
        full = self._padded(rows)
        longest = max(len(row.fed) for row in full)
        capacity = bucket(max(len(row.held) for row in full) + longest, engine.PREFILL_CHUNK)
        prefilled = engine.prefill(self.model, [row.held for row in full], capacity)
        scored = engine.score(
            self.model, self.mode, prefilled, [row.fed for row in full], [row.targets for row in full]
        )
        results = []
        for row, of, logits in zip(rows, scored, np.asarray(prefilled.logits), strict=False):
            total, greedy = -float(np.sum(of.nll)), all(of.greedy)
            if row.first is not None:
                total += float(logits[row.first] - np.logaddexp.reduce(logits))
                greedy = greedy and int(logits.argmax()) == row.first
            results.append((total, greedy))
        return results

    def _prompt(self, text: str, max_new: int) -> list[int]:
        room = self.max_length - max_new
        if room < 1:
            raise InvalidArgumentError(f"{max_new} new tokens leave no room in max_length={self.max_length}.")
        return (self.tok_encode(text) or [self.prefix_token_id])[-room:]

    def _continue(self, prompts: list[list[int]], until: tuple[str, ...], max_new: int) -> list[str]:
        capacity = bucket(max(map(len, prompts)) + max_new, engine.PREFILL_CHUNK)
        prefilled = engine.prefill(self.model, self._padded(prompts), capacity)

        def text(ids: list[int]) -> str:
            return self.model.tokenizer.decode(ids)

        def stopped(ids: list[int]) -> bool:
            return any(stop in text(ids) for stop in until)

        answers = engine.answer(self.model, self.mode, prefilled, max_new, stopped if until else None)
        return [_until(text(answer.tokens), until) for answer in answers[: len(prompts)]]


class _Row:
    """A context and its continuation, as the engine takes them. The context's last token is held back from the prefill
    and fed first; where it is the only one, the prefill, which is dense, predicts the first token."""

    def __init__(self, context: list[int], continuation: list[int]):
        lone = len(context) == 1
        self.first = continuation[0] if lone else None
        self.held = context if lone else context[:-1]
        self.fed = continuation[:-1] if lone else [context[-1], *continuation[:-1]]
        self.targets = continuation[1:] if lone else continuation


def _settings(arguments: dict[str, Any], max_new: int) -> tuple[tuple[str, ...], int]:
    """Stop strings and most new tokens of a request."""
    if arguments.get("do_sample", bool(arguments.get("temperature"))):
        raise InvalidArgumentError(
            "a task asks for sampling and certjax.eval.harness decodes greedily; pass --gen_kwargs "
            "do_sample=False,temperature=0."
        )
    until = arguments.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    limits = [int(arguments[name]) for name in TOKEN_LIMITS if arguments.get(name) is not None]
    return tuple(stop for stop in stops if stop), (limits or [max_new])[0]


def _until(text: str, stops: tuple[str, ...]) -> str:
    """The text before the first of the stop strings."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
