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
from certjax.programs import jitted

STEPS = 256
"""Decode steps of one call: the loop can be interrupted between calls."""
ROOM = 1024
"""Programs are compiled for multiples of so many steps: all that one mode does at one context and batch is one program,
whatever a task asks for. What is carried of a step is small."""
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
    asked = _Asked.answering(len(prefilled.lengths), _room(max_new_tokens - 1))
    state = _open(config, mode.kind, mode.policy, asked, prefilled.cache, prefilled.logits)
    for limit in _limits(max_new_tokens, ASK if enough else STEPS):  # the first token is the prefill's
        state = _run(config, mode.kind, mode.policy, model.params, state, asked, jnp.int32(limit - 1))
        ids, ends, done = (np.asarray(x) for x in (state.tokens, state.ends, state.done))
        if all(over or (enough and enough(row[:n].tolist())) for row, n, over in zip(ids, ends, done, strict=True)):
            break
    certificates = summaries(state.tally, config, prefilled.lengths)
    seconds = (time.perf_counter() - began) / len(ids)
    rows = zip(ids, ends, certificates, strict=True)
    return [Answer(row[:n].tolist(), certificate, seconds) for row, n, certificate in rows]


def score(
    model: Model,
    mode: EvalMode,
    prefilled: Prefilled,
    fed: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
) -> list[Scored]:
    """Feed each row its tokens, one a step, and score what follows each: `targets[row][i]` after `fed[row][i]`.

    Rows may have different lengths.

    Raises
    ------
    ContextLengthError
        If the tokens do not fit the caches.
    """
    config, began = model.config, time.perf_counter()
    counts = [len(row) for row in fed]
    _check_room(prefilled, max(counts))
    asked = _Asked.scoring(fed, targets, _room(max(counts)))
    state = _open(config, mode.kind, mode.policy, asked, prefilled.cache, prefilled.logits)
    for limit in _limits(max(counts), STEPS):
        state = jax.block_until_ready(
            _run(config, mode.kind, mode.policy, model.params, state, asked, jnp.int32(limit))
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


def _room(steps: int) -> int:
    return max(1, -(-steps // ROOM)) * ROOM


def _check_room(prefilled: Prefilled, tokens: int) -> None:
    if max(prefilled.lengths) + tokens > prefilled.cache.max_length:
        raise ContextLengthError(
            f"the longest prompt has {max(prefilled.lengths)} tokens; with {tokens} more it exceeds the "
            f"{prefilled.cache.max_length} that its cache holds."
        )


# -- the loop -----------------------------------------------------------------------------------------


@struct.dataclass
class _Asked:
    """What the rows of a batch are to do: an argument of the loop, so that scoring and answering are one program."""

    fed: jax.Array  # [b, T] int32, read where `forced`
    targets: jax.Array  # [b, T] int32
    counts: jax.Array  # [b] int32, steps of each row
    forced: jax.Array  # [] bool: feed what is given, not what is said

    @classmethod
    def scoring(cls, fed: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], steps: int) -> _Asked:
        pairs = np.zeros((2, len(fed), steps), np.int32)
        for row, (inputs, outputs) in enumerate(zip(fed, targets, strict=True)):
            pairs[:, row, : len(inputs)] = inputs, outputs
        counts = jnp.asarray([len(row) for row in fed], jnp.int32)
        return cls(jnp.asarray(pairs[0]), jnp.asarray(pairs[1]), counts, jnp.asarray(True))

    @classmethod
    def answering(cls, batch: int, steps: int) -> _Asked:
        nothing = jnp.zeros((batch, steps), jnp.int32)
        return cls(nothing, nothing, jnp.full(batch, steps, jnp.int32), jnp.asarray(False))


@struct.dataclass
class _State:
    """What the loop carries. T steps."""

    cache: DenseKVCache | TieredKVCache
    tokens: jax.Array  # [b, T + 1] int32, fed so far and the next
    done: jax.Array  # [b] bool, whether a row has said its end
    ends: jax.Array  # [b] int32, tokens of a row, the end-of-sequence token included
    nll: jax.Array  # [T, b] float32
    greedy: jax.Array  # [T, b] bool
    at: jax.Array  # [] int32, steps taken
    tally: Tally


@functools.partial(jax.jit, static_argnames=("config", "mode", "policy"))
def _open(
    config: LlamaConfig, mode: Mode, policy: Policy, asked: _Asked, prefilled: DenseKVCache, logits: jax.Array
) -> _State:
    batch, steps = asked.fed.shape
    first = jnp.where(asked.forced, asked.fed[:, 0], logits.argmax(-1).astype(jnp.int32))
    return _State(
        # A copy in dense mode: the loop overwrites its cache, and the other modes need this one.
        cache=jax.tree.map(jnp.copy, prefilled) if mode == "dense" else make_cache(mode, policy, prefilled),
        tokens=jnp.zeros((batch, steps + 1), jnp.int32).at[:, 0].set(first),
        done=~asked.forced & _ends(config, first),
        ends=jnp.ones(batch, jnp.int32),
        nll=jnp.zeros((steps, batch)),
        greedy=jnp.zeros((steps, batch), bool),
        at=jnp.int32(0),
        tally=Tally.empty(config, mode, batch, steps),
    )


@functools.partial(jitted, static_argnames=("config", "mode", "policy"), donate_argnames=("state",))
def _run(
    config: LlamaConfig,
    mode: Mode,
    policy: Policy,
    params: Any,
    state: _State,
    asked: _Asked,
    limit: jax.Array,
) -> _State:
    """Steps up to `limit` (`[]` int32), or until every row has ended. One `lax.while_loop`."""

    def of_step(x, at):
        return lax.dynamic_index_in_dim(x, at, 1, keepdims=False)

    def advance(s: _State) -> _State:
        logits, cache, records = decode.step(config, mode, policy, params, s.cache, of_step(s.tokens, s.at))
        target = of_step(asked.targets, s.at)
        said = logits.argmax(-1).astype(jnp.int32)
        nll = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, target[:, None], 1)[:, 0]
        given = of_step(asked.fed, jnp.minimum(s.at + 1, asked.fed.shape[1] - 1))
        token = jnp.where(asked.forced, given, jnp.where(s.done, 0, said))
        return _State(
            cache=cache,
            tokens=lax.dynamic_update_index_in_dim(s.tokens, token, s.at + 1, 1),
            done=s.done | (~asked.forced & _ends(config, token)),
            ends=jnp.where(s.done, s.ends, s.at + 2),
            nll=s.nll.at[s.at].set(nll),
            greedy=s.greedy.at[s.at].set(said == target),
            at=s.at + 1,
            tally=s.tally.add(records, ~s.done & (s.at < asked.counts), s.at),
        )

    return lax.while_loop(lambda s: (s.at < limit) & ~s.done.all(), advance, state)


def _ends(config: LlamaConfig, token: jax.Array) -> jax.Array:
    if not config.eos_token_ids:
        return jnp.zeros(token.shape, bool)
    return jnp.isin(token, jnp.asarray(config.eos_token_ids, jnp.int32))
