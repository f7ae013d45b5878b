"""The model's contract: parameter tree, stacked records, caches in host memory."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from certjax.models.llama.modeling import decode_step, forward, init_params, unembed
from tests.models import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")


def expected_shapes(c):
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim

    def linear(n_in, n_out, bias):
        bias = {"bias": (c.n_layers, n_out)} if bias else {}
        return {"kernel": (c.n_layers, n_in, n_out), **bias}

    tree = {
        "embed": {"embedding": (c.vocab_size, c.d_model)},
        "layers": {
            "attn_norm": {"scale": (c.n_layers, c.d_model)},
            "attn": {
                "q_proj": linear(c.d_model, q, c.attention_bias),
                "k_proj": linear(c.d_model, kv, c.attention_bias),
                "v_proj": linear(c.d_model, kv, c.attention_bias),
                "o_proj": linear(q, c.d_model, c.attention_bias),
            },
            "mlp_norm": {"scale": (c.n_layers, c.d_model)},
            "mlp": {
                "gate_proj": linear(c.d_model, c.d_ff, c.mlp_bias),
                "up_proj": linear(c.d_model, c.d_ff, c.mlp_bias),
                "down_proj": linear(c.d_ff, c.d_model, c.mlp_bias),
            },
        },
        "final_norm": {"scale": (c.d_model,)},
    }
    return tree if c.tie_embeddings else tree | {"lm_head": {"kernel": (c.d_model, c.vocab_size)}}


@pytest.mark.parametrize("name", ["gqa", "mqa", "tied", "wide_heads", "attention_bias", "mlp_bias"])
def test_parameter_tree_is_the_documented_one(name):
    params = jax.eval_shape(lambda key: init_params(tiny.CONFIGS[name], key), jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, params) == expected_shapes(tiny.CONFIGS[name])


def test_layers_of_random_parameters_differ():
    kernel = init_params(tiny.GQA, jax.random.key(0))["layers"]["attn"]["q_proj"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])
    np.testing.assert_allclose(kernel.std(), tiny.GQA.d_model**-0.5, rtol=0.1)


def test_records_are_stacked_over_layers_in_order():
    params = init_params(tiny.GQA, jax.random.key(0))

    def attend(q, k, v, cache, layer, project):
        return project(q), cache, {"layer": layer, "sum": q.sum((1, 3))}

    at = jnp.zeros(2, jnp.int32)
    logits, _, records = decode_step(tiny.GQA, params, None, at, at, attend)
    assert records["layer"].tolist() == [0, 1, 2]
    assert records["sum"].shape == (3, 2, tiny.GQA.n_heads)
    assert logits.shape == (2, tiny.GQA.vocab_size) and logits.dtype == jnp.float32


def test_plug_may_answer_in_float32_whatever_the_model_dtype():
    config = dataclasses.replace(tiny.GQA, dtype="bfloat16")
    params = init_params(config, jax.random.key(0))
    one = jnp.zeros((1, 1), jnp.int32)
    hidden, _, _ = forward(
        config, params, one, one, None,
        lambda q, k, v, cache, layer, project: (project(q.astype(jnp.float32)), cache, None),
    )  # fmt: skip
    assert hidden.dtype == jnp.bfloat16 and unembed(config, params, hidden).dtype == jnp.float32


def test_cache_with_a_tier_in_host_memory_passes_through_the_layers():
    params = init_params(tiny.GQA, jax.random.key(0))
    shape = (tiny.GQA.n_layers, 1, 1, tiny.GQA.n_kv_heads, tiny.GQA.head_dim)
    kind = "pinned_host"
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=kind)
    tier2 = jax.device_put(jnp.zeros(shape), place)

    def attend(q, k, v, cache, layer, project):
        assert jax.typeof(cache).memory_space == jax.memory.Space.Host
        k = jax.device_put(k[None], jax.memory.Space.Host)
        return project(q), jax.lax.dynamic_update_slice(cache, k, (layer, 0, 0, 0, 0)), None

    step = jax.jit(lambda p, c, t: decode_step(tiny.GQA, p, c, t, t, attend), donate_argnums=1)
    _, cache, _ = step(params, tier2, jnp.zeros(1, jnp.int32))
    assert cache.sharding.memory_kind == kind
    assert (jnp.abs(jax.device_get(cache)).sum((1, 2, 3, 4)) > 0).all()


def test_decode_holds_no_second_copy_of_cache_or_embedding():
    config = dataclasses.replace(tiny.CONFIGS["tied"], vocab_size=4096, n_layers=8)
    params = init_params(config, jax.random.key(0))
    cache = tiny.empty_cache(config, 2, 2048)
    embedding = params["embed"]["embedding"]

    def step(params, cache, tokens):
        logits, cache, _ = decode_step(config, params, cache, tokens, cache.length, tiny.dense_attend)
        return logits, cache.advance(1)

    compiled = jax.jit(step, donate_argnums=1).lower(params, cache, jnp.zeros(2, jnp.int32)).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    one_layer = cache.nbytes() // config.n_layers
    # The test's plug reads one layer as float32; the rest is activations and one layer's weights.
    assert temporary < 2.5 * one_layer and embedding.nbytes + cache.nbytes() > 3 * temporary
