"""The compiled programs of generation: prefill into a cache, and the decode loop. Pure functions."""

from __future__ import annotations

import functools
from typing import Any

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
from certjax.plugs import Mode, make_cache, make_plug
from certjax.policy import Policy
from certjax.prefill import prefill
from certjax.sampling import Sampling, sample


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
    telemetry: Telemetry


@functools.partial(jax.jit, static_argnames=("config", "mode", "policy", "sampling", "capacity", "max_steps"))
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
    """Prefill, encode the cache, sample the first token.

    Parameters
    ----------
    tokens : `[b, T_pad]` int32, right-padded prompts
    lengths : `[b]` int32
    capacity, max_steps
        Tokens the cache holds, decode steps there is room to record.
    """
    batch = tokens.shape[0]
    empty = DenseKVCache.zeros(
        config.n_layers, batch, config.n_kv_heads, capacity, config.head_dim, jnp.dtype(config.kv_dtype)
    )
    prefilled, logits = prefill(config, params, empty, tokens, lengths)
    cache = make_cache(mode, policy, prefilled)
    first = sample(logits, sampling, key, jnp.int32(0))
    done = _ends(config, first)
    return DecodeState(
        cache=cache,
        tokens=jnp.zeros((batch, max_steps + 1), jnp.int32).at[:, 0].set(first),
        last=first,
        count=jnp.int32(1),
        done=done,
        finished_at=jnp.ones(batch, jnp.int32),
        key=key,
        telemetry=Telemetry(
            certificate=empty_certificate((max_steps, config.n_layers, batch, config.n_heads))
            if mode == "certified"
            else None,
            valid=jnp.zeros((max_steps, batch), bool),
        ),
    )


@functools.partial(
    jax.jit, static_argnames=("config", "mode", "policy", "sampling"), donate_argnames=("state",)
)
def run(
    config: LlamaConfig,
    mode: Mode,
    policy: Policy,
    sampling: Sampling,
    params: Any,
    state: DecodeState,
    limit: jax.Array,
) -> DecodeState:
    """Decode until `limit` tokens (`[]` int32) have been generated or every sequence has ended.

    One `lax.while_loop`; streaming calls the same program with a growing limit.
    """
    attend = make_plug(mode, policy)

    def step(s: DecodeState) -> DecodeState:
        logits, cache, records = decode_step(config, params, s.cache, s.last, s.cache.length, attend)
        token = jnp.where(s.done, 0, sample(logits, sampling, s.key, s.count))
        at = s.count - 1
        record = jax.tree.map(
            lambda buffer, x: lax.dynamic_update_index_in_dim(buffer, x.astype(buffer.dtype), at, 0),
            s.telemetry.certificate,
            records,
        )
        valid = lax.dynamic_update_index_in_dim(s.telemetry.valid, ~s.done, at, 0)
        cache = cache.advance(1) if mode == "dense" else cache.advance()
        if mode == "certified" and policy.scrub and pick_backend(policy, cache, config.n_heads) in FUSED:
            cache = scrubbed(cache, policy.scrub)
        return DecodeState(
            cache=cache,
            tokens=lax.dynamic_update_index_in_dim(s.tokens, token, s.count, 1),
            last=token,
            count=s.count + 1,
            done=s.done | _ends(config, token),
            finished_at=jnp.where(s.done, s.finished_at, s.count + 1),
            key=s.key,
            telemetry=Telemetry(certificate=record, valid=valid),
        )

    return lax.while_loop(lambda s: (s.count < limit) & ~s.done.all(), step, state)


def _ends(config: LlamaConfig, token: jax.Array) -> jax.Array:
    if not config.eos_token_ids:
        return jnp.zeros(token.shape, bool)
    return jnp.isin(token, jnp.asarray(config.eos_token_ids, jnp.int32))
