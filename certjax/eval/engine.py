"""What a benchmark asks of a model: prefill once, then decode or score in every mode from the same originals.

Rows of a batch are padded on the right; what a row gets depends on the others by rounding only.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from certjax import decode
from certjax.cache import TieredKVCache
from certjax.dense_cache import DenseKVCache
from certjax.errors import ContextLengthError, InvalidArgumentError
from certjax.eval.modes import EvalMode
from certjax.eval.records import CertificateSummary
from certjax.eval.tally import Tally, step_bounds, summaries
from certjax.fused.dispatch import pick_backend
from certjax.generate import PREFILL_CHUNK
from certjax.model import Model
from certjax.models.llama.config import LlamaConfig
from certjax.plugs import Mode, make_cache
from certjax.policy import Policy
from certjax.sampling import Sampling

STEPS = 256
"""Decode steps of one call: the loop can be interrupted between calls."""
ASK = 16
"""Tokens between two questions whether they are enough."""


@dataclasses.dataclass(frozen=True)
class Prefilled:
    """Prompts in a dense cache, and the logits `[b, V]` after them."""

    cache: DenseKVCache
    logits: jax.Array
    lengths: list[int]


@dataclasses.dataclass(frozen=True)
class Answer:
    """Greedy continuation of one prompt, its end-of-sequence token included.

    `seconds` is a row's share of the batch's, compilation included.
    """

    tokens: list[int]
    certificate: CertificateSummary | None
    seconds: float


@dataclasses.dataclass(frozen=True)
class Scored:
    """Tokens of one row under teacher forcing.

    Attributes
    ----------
    nll
        Nats of each target.
    greedy
        Whether it is what greedy decoding would have said.
    bound
        Largest bound of its step before heads went dense; None in dense mode.
    """

    nll: list[float]
    greedy: list[bool]
    bound: list[float] | None
    certificate: CertificateSummary | None
    seconds: float


def capacity_for(tokens: int) -> int:
    """Columns of the caches of a context: whole chunks of the prefill, so that a context has one shape."""
    return -(-tokens // PREFILL_CHUNK) * PREFILL_CHUNK


def check_fit(model: Model, mode: EvalMode, context: int) -> None:
    """Refuse, before any work, what a model and a context do not allow.

    Raises
    ------
    ContextLengthError
        If the context exceeds the model's.
    InvalidArgumentError
        If the policy's format does not fit the model, or its back end the device.
    """
    c = model.config
    if context > c.context_length:
        raise ContextLengthError(f"context {context} exceeds the {c.context_length} of model {model.name}; lower it.")
    if mode.kind == "dense":
        return
    shape = (c.n_layers, 1, c.n_kv_heads, capacity_for(context), c.head_dim)
    originals = jax.ShapeDtypeStruct(shape, jnp.dtype(c.kv_dtype))
    prefilled = DenseKVCache(originals, originals, jax.ShapeDtypeStruct((1,), jnp.int32))
    try:
        cache = jax.eval_shape(functools.partial(make_cache, mode.kind, mode.policy), prefilled)
        pick_backend(mode.policy, cache, c.n_heads)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"mode {mode.label!r} does not fit model {model.name}: {error}") from error


def prefill(model: Model, prompts: Sequence[Sequence[int]], capacity: int) -> Prefilled:
    """Run prompts of token ids through the model, densely, into caches that hold `capacity` tokens each.

    Raises
    ------
    ContextLengthError
        If a prompt does not fit.
    InvalidArgumentError
        If a prompt is empty.
    """
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths) < 1:
        raise InvalidArgumentError("a prompt is empty; every prompt needs at least one token.")
    if max(lengths) > capacity:
        raise ContextLengthError(f"a prompt has {max(lengths)} tokens and its cache holds {capacity}.")
    tokens = np.zeros((len(prompts), capacity), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    # Chunks beyond the longest prompt are not computed.
    cache, logits = decode.fill(
        model.config, capacity, model.params, jnp.asarray(tokens), jnp.asarray(lengths, jnp.int32)
    )
    return Prefilled(cache, logits, lengths)


def answer(
    model: Model,
    mode: EvalMode,
    prefilled: Prefilled,
    max_new_tokens: int,
    enough: Callable[[list[int]], bool] | None = None,
) -> list[Answer]:
    """Decode greedily, to the end of sequence or `max_new_tokens`.

    Parameters
    ----------
    enough
        Of a row's tokens so far: whether no more are wanted. Asked from time to time; it ends when all rows agree.

    Raises
    ------
    ContextLengthError
        If prompts and new tokens do not fit the caches.
    """
    config, began = model.config, time.perf_counter()
    _check_room(prefilled, max_new_tokens)
    cache = prefilled.cache
    if mode.kind == "dense":  # the loop overwrites its cache, and the other modes need this one
        cache = jax.tree.map(jnp.copy, cache)
    state = decode.begin(
        config, mode.kind, mode.policy, Sampling(), max_new_tokens - 1, Tally, cache, prefilled.logits,
        jax.random.key(0),
    )  # fmt: skip
    for limit in _limits(max_new_tokens, ASK if enough else STEPS):
        state = decode.run(config, mode.kind, mode.policy, Sampling(), model.params, state, jnp.int32(limit))
        ids, ends, done = (np.asarray(x) for x in (state.tokens, state.finished_at, state.done))
        if all(over or (enough and enough(row[:n].tolist())) for row, n, over in zip(ids, ends, done, strict=True)):
            break
    certificates = summaries(state.telemetry, config, prefilled.lengths)
    seconds = (time.perf_counter() - began) / len(ids)
    rows = zip(ids, ends, certificates, strict=True)
    return [Answer(row[:n].tolist(), certificate, seconds) for row, n, certificate in rows]


def score(
    model: Model,
    mode: EvalMode,
    prefilled: Prefilled,
    fed: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    max_steps: int | None = None,
) -> list[Scored]:
    """Feed each row its tokens, one a step, and score what follows each: `targets[row][i]` after `fed[row][i]`.

    Parameters
    ----------
    max_steps
        What the program is compiled for, by default the longest row. Rows may have different lengths.

    Raises
    ------
    ContextLengthError
        If the tokens do not fit the caches.
    """
    config, began = model.config, time.perf_counter()
    counts = [len(row) for row in fed]
    steps = max(counts) if max_steps is None else max_steps
    _check_room(prefilled, max(counts))
    pairs = np.zeros((2, len(counts), steps), np.int32)
    for row, (inputs, outputs) in enumerate(zip(fed, targets, strict=True)):
        pairs[:, row, : len(inputs)] = inputs, outputs
    given = jnp.asarray(pairs[0]), jnp.asarray(pairs[1]), jnp.asarray(counts, jnp.int32)
    state = _open(config, mode.kind, mode.policy, steps, prefilled.cache)
    for limit in _limits(max(counts), STEPS):
        state = jax.block_until_ready(
            _force(config, mode.kind, mode.policy, model.params, state, *given, jnp.int32(limit))
        )
    nll, greedy = np.asarray(state.nll), np.asarray(state.greedy)
    bounds, certificates = step_bounds(state.tally), summaries(state.tally, config, prefilled.lengths)
    seconds = (time.perf_counter() - began) / len(counts)
    return [
        Scored(nll[:n, row].tolist(), greedy[:n, row].tolist(), bounds[row], certificates[row], seconds)
        for row, n in enumerate(counts)
    ]


def _limits(n: int, stride: int) -> list[int]:
    return [*range(stride, n, stride), n]


def _check_room(prefilled: Prefilled, tokens: int) -> None:
    if max(prefilled.lengths) + tokens > prefilled.cache.max_length:
        raise ContextLengthError(
            f"the longest prompt has {max(prefilled.lengths)} tokens; with {tokens} more it exceeds the "
            f"{prefilled.cache.max_length} that its cache holds."
        )


# -- teacher forcing ----------------------------------------------------------------------------------


@struct.dataclass
class _Forced:
    """What the loop carries. T steps."""

    cache: DenseKVCache | TieredKVCache
    nll: jax.Array  # [T, b] float32
    greedy: jax.Array  # [T, b] bool
    at: jax.Array  # [] int32
    tally: Tally


@functools.partial(jax.jit, static_argnames=("config", "mode", "policy", "steps"))
def _open(config: LlamaConfig, mode: Mode, policy: Policy, steps: int, prefilled: DenseKVCache) -> _Forced:
    batch = prefilled.length.shape[0]
    # A copy in dense mode: the loop overwrites its cache.
    cache = jax.tree.map(jnp.copy, prefilled) if mode == "dense" else make_cache(mode, policy, prefilled)
    return _Forced(
        cache=cache,
        nll=jnp.zeros((steps, batch)),
        greedy=jnp.zeros((steps, batch), bool),
        at=jnp.int32(0),
        tally=Tally.empty(config, mode, batch, steps),
    )


@functools.partial(jax.jit, static_argnames=("config", "mode", "policy"), donate_argnames=("state",))
def _force(
    config: LlamaConfig,
    mode: Mode,
    policy: Policy,
    params: Any,
    state: _Forced,
    fed: jax.Array,
    targets: jax.Array,
    counts: jax.Array,
    limit: jax.Array,
) -> _Forced:
    """Steps up to `limit`. `fed`, `targets`: `[b, T]` int32, of which row r has `counts[r]`."""

    def feed(s: _Forced) -> _Forced:
        token, target = (lax.dynamic_index_in_dim(x, s.at, 1, keepdims=False) for x in (fed, targets))
        logits, cache, records = decode.step(config, mode, policy, params, s.cache, token)
        said = jnp.take_along_axis(logits, target[:, None], 1)[:, 0]
        return _Forced(
            cache=cache,
            nll=s.nll.at[s.at].set(jax.nn.logsumexp(logits, -1) - said),
            greedy=s.greedy.at[s.at].set(logits.argmax(-1) == target),
            at=s.at + 1,
            tally=s.tally.add(records, s.at < counts, s.at),
        )

    return lax.while_loop(lambda s: s.at < limit, feed, state)
