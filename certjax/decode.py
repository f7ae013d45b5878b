"""The compiled programs of generation: prefill, a cache made of it, and the decode loop. Pure functions."""

from __future__ import annotations

import functools
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from certjax.cache import TieredKVCache
from certjax.certificate import Certificate, empty_certificate
from certjax.checks import scrubbed
from certjax.dense_cache import DenseKVCache
from certjax.fused.dispatch import FUSED, pick_backend
from certjax.models.llama.config import LlamaConfig
from certjax.models.llama.modeling import decode_step
from certjax.plugs import Mode, make_plug
from certjax.policy import Policy
from certjax.prefill import prefill
from certjax.programs import jitted
from certjax.sampling import Sampling, sample


class Recorder(Protocol):
    """What a decode loop writes of its steps: a pytree, carried by the loop."""

    @classmethod
    def empty(cls, config: LlamaConfig, mode: Mode, batch: int, max_steps: int) -> Self:
        """With room for `max_steps` steps."""
        ...

    def add(self, records: Certificate | None, alive: jax.Array, at: jax.Array) -> Self:
        """With step `at` (`[]` int32): its certificates `[L, batch, Hq]`, and the sequences `[batch]` it counts for."""
        ...


@struct.dataclass
class Telemetry:
    """What every step said of itself.

    Attributes
    ----------
    certificate
        Leaves `[T, L, batch, Hq]` for T steps and L layers; None in modes that certify nothing.
    valid : `[T, batch]` bool
        Steps that ran for a sequence that had not ended.
    """

    certificate: Certificate | None
    valid: jax.Array

    @classmethod
    def empty(cls, config: LlamaConfig, mode: Mode, batch: int, max_steps: int) -> Telemetry:
        """As `Recorder`."""
        shape = (max_steps, config.n_layers, batch, config.n_heads)
        return cls(empty_certificate(shape) if mode == "certified" else None, jnp.zeros((max_steps, batch), bool))

    def add(self, records: Certificate | None, alive: jax.Array, at: jax.Array) -> Telemetry:
        """As `Recorder`."""

        def store(buffer, x):
            return lax.dynamic_update_index_in_dim(buffer, x.astype(buffer.dtype), at, 0)

        return Telemetry(jax.tree.map(store, self.certificate, records), store(self.valid, alive))


@struct.dataclass
class DecodeState:
    """Everything the decode loop carries."""

    cache: DenseKVCache | TieredKVCache
    tokens: jax.Array  # [b, T + 1] int32, generated so far, padded with 0
    last: jax.Array  # [b] int32
    count: jax.Array  # [] int32, tokens generated
    done: jax.Array  # [b] bool
    finished_at: jax.Array  # [b] int32, tokens of each row, EOS included
    key: jax.Array
    telemetry: Recorder


@functools.partial(jax.jit, static_argnames=("config", "capacity"))
def fill(
    config: LlamaConfig, capacity: int, params: Any, tokens: jax.Array, lengths: jax.Array
) -> tuple[DenseKVCache, jax.Array]:
    """Prefill: the originals of every mode's cache, and the logits `[b, V]` at the prompts' last tokens.

    Parameters
    ----------
    capacity
        Tokens the cache holds.
    tokens : `[b, T_pad]` int32, right-padded prompts
    lengths : `[b]` int32
    """
    return prefill(config, params, DenseKVCache.empty(config, tokens.shape[0], capacity), tokens, lengths)


@functools.partial(jax.jit, static_argnames=("config", "form", "capacity", "originals"))
def fill_tiered(
    config: LlamaConfig,
    form: Policy,
    capacity: int,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    originals: bool = True,
) -> tuple[TieredKVCache, jax.Array]:
    """`fill` of the cache of a tiered mode alone: each layer is encoded, and its originals are on their way to the
    host, before the next one begins, so that those of no other layer take room on the device.

    Parameters
    ----------
    form
        A policy; `Policy.form` of one, so that the program serves all that store a cache alike.
    originals
        Whether the cache has them. Naive mode never looks at them.
    """
    scratch = DenseKVCache.empty(config, tokens.shape[0], capacity, n_layers=1)
    lengths = lengths.astype(jnp.int32)

    def keep(keys, values):
        layer = TieredKVCache.encode_layer(keys, values, form, lengths, capacity)
        return layer if originals else layer | dict(host_keys=None, host_values=None)

    layers, logits = prefill(config, params, scratch, tokens, lengths, keep=keep)
    return TieredKVCache.of_layers(layers, form, lengths), logits


def begin(
    config: LlamaConfig,
    mode: Mode,
    sampling: Sampling,
    max_steps: int,
    recorder: type[Recorder],
    cache: DenseKVCache | TieredKVCache,
    logits: jax.Array,
    key: jax.Array,
) -> DecodeState:
    """Sample the first token, and decode from the mode's `cache`: the state has that itself, which `run` overwrites.

    Parameters
    ----------
    max_steps
        Decode steps there is room to record.
    recorder
        `Telemetry`, or another `Recorder`.
    """
    # Not a part of the program: what goes through one is copied.
    return _first(config, mode, sampling, max_steps, recorder, logits, key).replace(cache=cache)


@functools.partial(jax.jit, static_argnames=("config", "mode", "sampling", "max_steps", "recorder"))
def _first(
    config: LlamaConfig,
    mode: Mode,
    sampling: Sampling,
    max_steps: int,
    recorder: type[Recorder],
    logits: jax.Array,
    key: jax.Array,
) -> DecodeState:
    """The state after the first token, without a cache."""
    batch = logits.shape[0]
    first = sample(logits, sampling, key, jnp.int32(0))
    return DecodeState(
        cache=None,
        tokens=jnp.zeros((batch, max_steps + 1), jnp.int32).at[:, 0].set(first),
        last=first,
        count=jnp.int32(1),
        done=_ends(config, first),
        finished_at=jnp.ones(batch, jnp.int32),
        key=key,
        telemetry=recorder.empty(config, mode, batch, max_steps),
    )


def start(
    config: LlamaConfig,
    mode: Mode,
    policy: Policy,
    sampling: Sampling,
    capacity: int,
    max_steps: int,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    key: jax.Array,
) -> DecodeState:
    """`fill` or `fill_tiered`, then `begin`."""
    if mode == "dense":
        cache, logits = fill(config, capacity, params, tokens, lengths)
    else:
        cache, logits = fill_tiered(
            config, policy.form, capacity, params, tokens, lengths, originals=mode == "certified"
        )
    return begin(config, mode, sampling, max_steps, Telemetry, cache, logits, key)


def step(
    config: LlamaConfig,
    mode: Mode,
    policy: Policy,
    params: Any,
    cache: DenseKVCache | TieredKVCache,
    tokens: jax.Array,
    positions: jax.Array | None = None,
) -> tuple[jax.Array, DenseKVCache | TieredKVCache, Certificate | None]:
    """One token (`[b]` int32) of every sequence through the model: logits `[b, V]` of the next, the cache that holds
    it, certificates with leaves `[L, b, Hq]`. `positions`, `[b]` int32, are those that the cache has come to unless
    given."""
    if mode == "certified":
        cache = cache.replace(sound=cache.sound & cache.counting().holds_all)
    plug = make_plug(mode, policy, cache, config.n_heads)
    positions = cache.length if positions is None else positions
    logits, cache, records = decode_step(config, params, cache, tokens, positions, plug)
    cache = cache.advance(1) if mode == "dense" else cache.advance()
    if mode != "certified":
        return logits, cache, None
    certificates, plan = records
    if plan is not None:
        cache = cache.replace(plan=plan)
    if policy.scrub and pick_backend(policy, cache, config.n_heads) in FUSED:
        cache = scrubbed(cache, policy.scrub)
    return logits, cache, Certificate.unpacked(certificates)


@functools.partial(jitted, static_argnames=("config", "mode", "policy", "sampling"), donate_argnames=("state",))
def run(
    config: LlamaConfig,
    mode: Mode,
    policy: Policy,
    sampling: Sampling,
    params: Any,
    state: DecodeState,
    limit: jax.Array,
) -> DecodeState:
    """Decode until `limit` tokens (`[]` int32) have been generated or every sequence has ended. Donates `state`.

    One `lax.while_loop`; streaming calls the same program with a growing limit.
    """

    def generate(s: DecodeState) -> DecodeState:
        logits, cache, records = step(config, mode, policy, params, s.cache, s.last)
        token = jnp.where(s.done, 0, sample(logits, sampling, s.key, s.count))
        return DecodeState(
            cache=cache,
            tokens=lax.dynamic_update_index_in_dim(s.tokens, token, s.count, 1),
            last=token,
            count=s.count + 1,
            done=s.done | _ends(config, token),
            finished_at=jnp.where(s.done, s.finished_at, s.count + 1),
            key=s.key,
            telemetry=s.telemetry.add(records, ~s.done, s.count - 1),
        )

    return lax.while_loop(lambda s: (s.count < limit) & ~s.done.all(), generate, state)


def _ends(config: LlamaConfig, token: jax.Array) -> jax.Array:
    if not config.eos_token_ids:
        return jnp.zeros(token.shape, bool)
    return jnp.isin(token, jnp.asarray(config.eos_token_ids, jnp.int32))
