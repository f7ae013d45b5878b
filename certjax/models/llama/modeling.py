"""LLaMA as pure functions over a parameter tree, with the attention as a plug.

The tree, for L layers (linear layers hold `bias` beside `kernel` where the config says so):

    embed.embedding [V, D]
    layers.attn_norm.scale [L, D]       layers.mlp_norm.scale [L, D]
    layers.attn.q_proj.kernel [L, D, Hq*d]   .k_proj, .v_proj [L, D, Hkv*d]   .o_proj [L, Hq*d, D]
    layers.mlp.gate_proj.kernel [L, D, F]    .up_proj [L, D, F]               .down_proj [L, F, D]
    final_norm.scale [D]
    lm_head.kernel [D, V]               (absent when the embeddings are tied)

Shape letters: b batch, T tokens, D d_model, F d_ff, V vocabulary, Hq/Hkv query/KV heads, d head_dim.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from certjax.models.llama.config import LlamaConfig
from certjax.models.llama.rope import rotate, rotation


@dataclasses.dataclass(frozen=True)
class OutputProjection:
    """The output projection of a layer: [b, T, Hq, d] of any float dtype -> [b, T, D]."""

    linear: Callable[[jax.Array], jax.Array]
    weights: dict[str, jax.Array]
    """`kernel` and perhaps `bias` of all layers, for kernels that take them where they lie: a slice would be copied."""

    def __call__(self, out: jax.Array) -> jax.Array:
        return self.linear(out)


Attend = Callable[[jax.Array, jax.Array, jax.Array, Any, jax.Array, OutputProjection], tuple[jax.Array, Any, Any]]
"""The attention plug, `attend(q, k, v, cache, layer, project) -> (project(out), cache, record)`.

`q` [b, T, Hq, d]; `k`, `v` [b, T, Hkv, d], after the rotary embedding, in the compute dtype; `layer` [] int32;
`out` [b, T, Hq, d]. `cache` is any pytree, that of all layers: the plug updates it in place at index `layer`. `record`
is any pytree; the model returns it stacked over layers. A plug has the projection to itself, so that it may project
what it is not yet sure of, and again where that did not do.
"""


# -- the functions ------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def init_params(config: LlamaConfig, key: jax.Array) -> dict:
    """Random parameters in `config.dtype`, scaled so that activations and logits stay of order one."""

    def touch_everything(model: Llama):
        one = jnp.zeros((1, 1), jnp.int32)
        hidden, _, _ = model(one, one, None)
        return model.unembed(hidden)

    def ignore(q, k, v, cache, layer, project):
        return project(q), cache, None

    return Llama(config, ignore).init(key, method=touch_everything)["params"]


def forward(
    config: LlamaConfig,
    params: dict,
    tokens: jax.Array,
    positions: jax.Array,
    cache: Any,
    attend: Attend,
) -> tuple[jax.Array, Any, Any]:
    """Run the layers on T new tokens per sequence.

    Parameters
    ----------
    tokens, positions : `[b, T]` int32
    cache
        Whatever `attend` takes; handed from layer to layer.

    Returns
    -------
    hidden : `[b, T, D]` in the compute dtype, after the final norm
    cache
    records : leaves `[L, ...]`
    """
    return Llama(config, attend, params["layers"]["attn"]["o_proj"]).apply({"params": params}, tokens, positions, cache)


def unembed(config: LlamaConfig, params: dict, hidden: jax.Array) -> jax.Array:
    """Logits of hidden states: `[..., D]` -> `[..., V]` float32."""
    return Llama(config).apply({"params": params}, hidden, method=Llama.unembed)


def decode_step(
    config: LlamaConfig,
    params: dict,
    cache: Any,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Attend,
) -> tuple[jax.Array, Any, Any]:
    """One token per sequence.

    Parameters
    ----------
    tokens, positions : `[b]` int32
        The last token of each sequence, and its position.

    Returns
    -------
    logits : `[b, V]` float32
    cache
    records : leaves `[L, ...]`
    """
    hidden, cache, records = forward(config, params, tokens[:, None], positions[:, None], cache, attend)
    return unembed(config, params, hidden[:, 0]), cache, records


# -- the modules --------------------------------------------------------------------------------------


def _dot(config: LlamaConfig, x: jax.Array, w: jax.Array, axis: int, dtype: Any = None) -> jax.Array:
    """Contract the last axis of `x` with `axis` of the matrix `w`, which is read as it lies."""
    # On GPUs a float32 product defaults to TF32, whose 10 bits would drown what the certificates speak of.
    precision = lax.Precision.HIGHEST if config.dtype == "float32" else lax.Precision.DEFAULT

    def dot(x, w):
        contract = (((x.ndim - 1,), (axis,)), ((), ()))
        return lax.dot_general(x, w, contract, precision=precision, preferred_element_type=dtype)

    def dot_of_rows(x, w):
        rows = jnp.pad(x.reshape(1, x.shape[-1]), ((0, ROWS - 1), (0, 0)))
        return dot(rows, w)[:1].reshape(*x.shape[:-1], -1)

    if x.size != x.shape[-1]:
        return dot(x, w)
    return lax.platform_dependent(x, w, cuda=dot_of_rows, default=dot)


ROWS = 8
"""Of a product with a single row on a GPU. XLA would multiply and add up a vector's products one by one, for which it
writes them to memory, or turns the whole matrix into float32 (docs/kernels.md); 8 rows take the matrix unit as long."""


class Linear(nn.Module):
    """`x W (+ bias)`, `[..., in]` -> `[..., features]`."""

    config: LlamaConfig
    features: int
    use_bias: bool = False
    out_dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = jnp.dtype(self.config.dtype)
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        kernel = self.param("kernel", init, (x.shape[-1], self.features), dtype)
        y = _dot(self.config, x, kernel.astype(dtype), 0, self.out_dtype)
        if not self.use_bias:
            return y
        return y + self.param("bias", nn.initializers.zeros, (self.features,), dtype).astype(y.dtype)


class Embed(nn.Module):
    """The token embedding, and its transpose as the output layer of models that tie the two."""

    config: LlamaConfig

    def setup(self):
        c = self.config
        init = nn.initializers.normal(c.d_model**-0.5)
        self.embedding = self.param("embedding", init, (c.vocab_size, c.d_model), jnp.dtype(c.dtype))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.embedding[tokens].astype(self.config.dtype)  # [b, T, D]

    def unembed(self, hidden: jax.Array) -> jax.Array:
        return _dot(self.config, hidden, self.embedding.astype(self.config.dtype), 1, jnp.float32)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * scale`, in float32."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.dtype(self.config.dtype))
        x = x.astype(jnp.float32)
        x = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.config.rms_eps)
        return (x * scale.astype(jnp.float32)).astype(self.config.dtype)


class Attention(nn.Module):
    """Projections and rotary embedding around the plug. `output`: the last one's weights, of all layers."""

    config: LlamaConfig
    attend: Attend
    output: dict[str, jax.Array] | None = None

    @nn.compact
    def __call__(self, x: jax.Array, cache: Any, layer: jax.Array, turn: tuple[jax.Array, jax.Array]):
        c = self.config

        def heads(name: str, n: int) -> jax.Array:
            y = Linear(c, n * c.head_dim, c.attention_bias, name=name)(x)
            return y.reshape(*x.shape[:2], n, c.head_dim)

        q = rotate(heads("q_proj", c.n_heads), *turn)  # [b, T, Hq, d]
        k = rotate(heads("k_proj", c.n_kv_heads), *turn)  # [b, T, Hkv, d]
        v = heads("v_proj", c.n_kv_heads)
        own = Linear(c, c.d_model, c.attention_bias, name="o_proj")

        def here(out):
            return own(out.reshape(*out.shape[:2], -1).astype(c.dtype))

        return self.attend(q, k, v, cache, layer, OutputProjection(here, self.output))


class MLP(nn.Module):
    """SwiGLU: `(silu(x W_gate) * x W_up) W_down`."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        gate = Linear(c, c.d_ff, c.mlp_bias, name="gate_proj")(x)
        up = Linear(c, c.d_ff, c.mlp_bias, name="up_proj")(x)
        return Linear(c, c.d_model, c.mlp_bias, name="down_proj")(nn.silu(gate) * up)


class Block(nn.Module):
    """One layer, in the form `nn.scan` takes: the carry is `(x, cache)`."""

    config: LlamaConfig
    attend: Attend
    output: dict[str, jax.Array] | None = None

    @nn.compact
    def __call__(self, carry: tuple[jax.Array, Any], layer: jax.Array, turn: tuple[jax.Array, jax.Array]):
        c = self.config
        x, cache = carry
        out, cache, record = Attention(c, self.attend, self.output, name="attn")(
            RMSNorm(c, name="attn_norm")(x), cache, layer, turn
        )
        x = x + out
        x = x + MLP(c, name="mlp")(RMSNorm(c, name="mlp_norm")(x))
        return (x, cache), record


class Llama(nn.Module):
    """The model; use the functions above unless you need a module. `attend` may be None for `unembed` alone; `output`
    is `Attention`'s."""

    config: LlamaConfig
    attend: Attend | None = None
    output: dict[str, jax.Array] | None = None

    def setup(self):
        c = self.config
        layers = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=c.n_layers,
            # The check traces the body once more, on avals that forget the memory space: a cache with a tier
            # in host memory would be refused there.
            check_constancy_invariants=False,
        )
        self.embed = Embed(c)
        self.layers = layers(c, self.attend, self.output)
        self.final_norm = RMSNorm(c)
        if not c.tie_embeddings:
            self.lm_head = Linear(c, c.vocab_size, out_dtype=jnp.float32)

    def __call__(self, tokens: jax.Array, positions: jax.Array, cache: Any) -> tuple[jax.Array, Any, Any]:
        c = self.config
        index = jnp.arange(c.n_layers, dtype=jnp.int32)
        (x, cache), records = self.layers((self.embed(tokens), cache), index, rotation(c, positions))
        return self.final_norm(x), cache, records

    def unembed(self, hidden: jax.Array) -> jax.Array:
        return self.embed.unembed(hidden) if self.config.tie_embeddings else self.lm_head(hidden)
