"""`generate` and `stream`: prompts in, text and certificates out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from certjax import arguments, decode
from certjax.errors import ContextLengthError, InvalidArgumentError
from certjax.model import Model
from certjax.models.llama.config import LlamaConfig
from certjax.plugs import MODES, Mode
from certjax.policy import Policy, require_policy
from certjax.report import Report, summarize
from certjax.sampling import Sampling

PREFILL_CHUNK = 256
Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    Attributes
    ----------
    tokens
        Generated ids of each sequence, the end-of-sequence token included when it was produced.
    text
        Decoded text of each sequence; None for a model without tokenizer.
    telemetry
        `Telemetry` with NumPy leaves, `[T, L, batch, Hq]` for T decode steps (the first token comes from
        the prefill, which is dense, so there is one step less than tokens).
    prompt_lengths
        Tokens of each prompt.
    """

    tokens: list[np.ndarray]
    text: list[str] | None
    telemetry: decode.Telemetry
    prompt_lengths: list[int]
    mode: Mode
    policy: Policy
    cache_bytes: dict[str, int]
    host_memory_kind: str | None
    first_token_seconds: float
    decode_seconds: float

    def __repr__(self) -> str:
        return (
            f"Generation({len(self.tokens)} sequences of {[len(t) for t in self.tokens]} tokens, mode={self.mode!r}, "
            f"{self.decode_seconds:.2f} s; .text, .tokens, .report())"
        )

    def report(self) -> Report:
        """Summary of promotions, rungs, bounds, bytes and speed."""
        return summarize(self)


def generate(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    mode: Mode = "certified",
    policy: Policy | None = None,
    key: jax.Array | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    chat: bool = False,
) -> Generation:
    """Generate a continuation of every prompt, in one batch.

    Parameters
    ----------
    model
        From `certjax.load`, or built from a config and parameters.
    prompts
        A text, a sequence of token ids, or a sequence of either, of any lengths.
    max_new_tokens
        Most tokens per sequence; generation ends earlier at an end-of-sequence token.
    mode
        "dense" (originals on the device), "naive" (tier 1, nothing checked) or "certified".
    policy
        Default `Policy.budget()`. Naive mode takes format and windows from it.
    key
        JAX PRNG key for sampling; default `jax.random.key(0)`.
    temperature, top_k, top_p
        See `Sampling`; the default is greedy.
    chat
        Put each text prompt through the model's chat template as a user's message.

    Raises
    ------
    InvalidArgumentError
        On an unknown mode, an empty prompt, ids outside the vocabulary, bad sampling parameters, or an argument of
        another type.
    ContextLengthError
        If prompt and new tokens exceed the model's context.
    """
    arguments.instance("model", model, Model, "certjax.load returns one")
    job = _prepare(model, prompts, max_new_tokens, mode, policy, key, temperature, top_k, top_p, chat)
    began = time.perf_counter()
    state = job.start()
    # Zero steps: compiles the loop, so that what is timed below is decoding.
    state = jax.block_until_ready(job.advance(state, 1))
    ready = time.perf_counter()
    state = jax.block_until_ready(job.advance(state, max_new_tokens))
    ended = time.perf_counter()

    ids = np.asarray(state.tokens)
    lengths = np.asarray(state.finished_at)
    steps = int(state.count) - 1
    tokens = [row[:n] for row, n in zip(ids, lengths, strict=True)]
    return Generation(
        tokens=tokens,
        text=[model.tokenizer.decode(t) for t in tokens] if model.tokenizer else None,
        telemetry=jax.tree.map(lambda x: np.asarray(x)[:steps], state.telemetry),
        prompt_lengths=job.prompt_lengths,
        mode=mode,
        policy=job.policy,
        cache_bytes=_cache_bytes(state.cache),
        host_memory_kind=_host_kind(state.cache),
        first_token_seconds=ready - began,
        decode_seconds=ended - ready,
    )


def stream(model: Model, prompt: Prompt, *, max_new_tokens: int = 64, **options: Any) -> Iterator[str]:
    """Yield the text of one prompt's continuation as it is generated. Options as for `generate`.

    The same compiled loop as `generate`, a token at a time; text is held back while its last character is
    incomplete.
    """
    arguments.instance("model", model, Model, "certjax.load returns one")
    if not isinstance(prompt, str) and any(not isinstance(t, (int, np.integer)) for t in prompt):
        raise InvalidArgumentError("stream takes one prompt; use generate for a batch.")
    if model.tokenizer is None:
        raise InvalidArgumentError("stream yields text and this model has no tokenizer; use generate.")
    defaults = {"mode": "certified", "policy": None, "key": None, "temperature": 0.0, "top_k": 0, "top_p": 1.0,
                "chat": False}  # fmt: skip
    if unknown := set(options) - set(defaults):
        raise TypeError(f"stream() got an unexpected keyword argument {sorted(unknown)[0]!r}")
    job = _prepare(model, prompt, max_new_tokens, **defaults | options)
    return _stream(model, job, max_new_tokens)


def _stream(model: Model, job: _Job, max_new_tokens: int) -> Iterator[str]:
    state, shown = job.start(), ""
    for limit in range(1, max_new_tokens + 1):
        state = job.advance(state, limit)
        text = model.tokenizer.decode(np.asarray(state.tokens)[0, : int(state.finished_at[0])])
        ended = limit == max_new_tokens or bool(state.done.all())
        if len(text) > len(shown) and (ended or not text.endswith("\ufffd")):
            yield text[len(shown) :]
            shown = text
        if ended:
            return


@dataclasses.dataclass(frozen=True)
class _Job:
    """Validated arguments, and the two compiled programs bound to them."""

    config: LlamaConfig
    params: Any
    mode: Mode
    policy: Policy
    sampling: Sampling
    tokens: jax.Array
    lengths: jax.Array
    key: jax.Array
    capacity: int
    max_steps: int

    @property
    def prompt_lengths(self) -> list[int]:
        return [int(n) for n in self.lengths]

    def start(self) -> decode.DecodeState:
        return decode.start(
            self.config, self.mode, self.policy, self.sampling, self.capacity, self.max_steps,
            self.params, self.tokens, self.lengths, self.key,
        )  # fmt: skip

    def advance(self, state: decode.DecodeState, limit: int) -> decode.DecodeState:
        return decode.run(
            self.config, self.mode, self.policy, self.sampling, self.params, state, jnp.int32(limit)
        )


def _prepare(
    model, prompts, max_new_tokens, mode, policy, key, temperature, top_k, top_p, chat
) -> _Job:
    if policy is not None:
        require_policy(policy)
    if mode not in MODES:
        raise InvalidArgumentError(f"unknown mode {mode!r}; choose one of {', '.join(MODES)}.")
    if arguments.integer("max_new_tokens", max_new_tokens) < 1:
        raise InvalidArgumentError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    sampling = Sampling(
        temperature=float(arguments.number("temperature", temperature)), top_k=arguments.integer("top_k", top_k),
        top_p=float(arguments.number("top_p", top_p)),
    )  # fmt: skip
    ids = [_encode(model, p, chat) for p in _as_batch(prompts)]
    longest = max(map(len, ids))
    context = model.config.context_length
    if longest + max_new_tokens > context:
        raise ContextLengthError(
            f"the longest prompt has {longest} tokens; with max_new_tokens={max_new_tokens} that is more than the "
            f"model's context of {context}. Shorten the prompt or lower max_new_tokens."
        )
    padded = bucket(longest, PREFILL_CHUNK)
    max_steps = bucket(max_new_tokens, 16)
    tokens = np.zeros((len(ids), padded), np.int32)
    for row, prompt in zip(tokens, ids, strict=True):
        row[: len(prompt)] = prompt
    return _Job(
        config=model.config,
        params=model.params,
        mode=mode,
        policy=Policy.budget() if policy is None else policy,
        sampling=sampling,
        tokens=jnp.asarray(tokens),
        lengths=jnp.asarray([len(p) for p in ids], jnp.int32),
        key=jax.random.key(0) if key is None else key,
        capacity=-(-(padded + max_steps) // PREFILL_CHUNK) * PREFILL_CHUNK,
        max_steps=max_steps,
    )


def _as_batch(prompts) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes):
        raise InvalidArgumentError("prompts is bytes; decode it to text, or pass token ids.")
    prompts = prompts.tolist() if isinstance(prompts, (np.ndarray, jax.Array)) else list(prompts)
    if not prompts:
        raise InvalidArgumentError("prompts is empty; pass at least one prompt.")
    return [prompts] if isinstance(prompts[0], (int, np.integer)) else prompts


def _encode(model: Model, prompt: Prompt, chat: bool) -> list[int]:
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise InvalidArgumentError("this model has no tokenizer; pass prompts as token ids.")
        if not prompt:
            raise InvalidArgumentError("a prompt is empty; every prompt needs at least one token.")
        prompt = model.tokenizer.encode(model.tokenizer.chat(prompt) if chat else prompt)
    ids = [arguments.integer("a token id", t) for t in prompt]
    if not ids:
        raise InvalidArgumentError("a prompt is empty; every prompt needs at least one token.")
    if min(ids) < 0 or max(ids) >= model.config.vocab_size:
        raise InvalidArgumentError(f"token ids must be in [0, {model.config.vocab_size}).")
    return ids


def bucket(n: int, unit: int) -> int:
    """`n` rounded up to a power of two times `unit`, or one and a half of it: few shapes, little padding."""
    size = unit
    while size < n:
        if size + size // 2 >= n and size // 2 % unit == 0:
            return size + size // 2
        size *= 2
    return size


def _cache_bytes(cache) -> dict[str, int]:
    sizes = cache.nbytes()
    return sizes if isinstance(sizes, dict) else {"device": sizes}


def _host_kind(cache) -> str | None:
    originals = getattr(cache, "host_keys", None)
    return None if originals is None else originals.sharding.memory_kind
