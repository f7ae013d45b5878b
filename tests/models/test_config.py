"""`LlamaConfig`: what it accepts, what it refuses, and what it reads from Hugging Face."""

from __future__ import annotations

import dataclasses

import pytest

from certjax.errors import InvalidArgumentError
from certjax.models.llama.config import LlamaConfig, RopeScaling
from tests.models.tiny import GQA

LLAMA31 = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    "rms_norm_eps": 1e-05, "max_position_embeddings": 131072, "hidden_act": "silu", "tie_word_embeddings": False,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "torch_dtype": "bfloat16",
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
}  # fmt: skip


def changed(**changes):
    return {**LLAMA31, **changes}


def test_named_config_equals_the_one_read_from_hugging_face():
    assert LlamaConfig.from_hf(LLAMA31) == LlamaConfig.llama31_8b()


def test_rope_parameters_of_transformers_5_mean_the_same_as_the_older_keys():
    new = {k: v for k, v in LLAMA31.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    new |= {"rope_parameters": {**LLAMA31["rope_scaling"], "rope_theta": 500000.0}, "dtype": "bfloat16"}
    assert LlamaConfig.from_hf(new) == LlamaConfig.llama31_8b()


def test_rope_scaling_accepts_the_older_key_type():
    config = LlamaConfig.from_hf(changed(rope_scaling={"type": "linear", "factor": 2.0}))
    assert config.rope_scaling == RopeScaling("linear", 2.0)


@pytest.mark.parametrize("rope", [None, {"rope_type": "default"}])
def test_unscaled_rope_is_none(rope):
    assert LlamaConfig.from_hf(changed(rope_scaling=rope)).rope_scaling is None


def test_absent_keys_take_the_defaults_of_transformers():
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    config = LlamaConfig.from_hf({k: LLAMA31[k] for k in sizes})
    assert (config.n_kv_heads, config.head_dim, config.rms_eps, config.rope_theta) == (32, 128, 1e-6, 10000.0)
    assert (config.eos_token_ids, config.bos_token_id, config.dtype) == ((2,), 1, "float32")


@pytest.mark.parametrize(("eos", "expected"), [(None, ()), (7, (7,)), ([7, 8], (7, 8))])
def test_eos_may_be_one_id_several_or_none(eos, expected):
    assert LlamaConfig.from_hf(changed(eos_token_id=eos)).eos_token_ids == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "no factor"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"model_type": "mistral"}, "mistral"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForCausalLM only"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": 4095}, "head_dim is not given"),
        ({"torch_dtype": "float64"}, "float64"),
    ],
)
def test_unsupported_feature_is_refused_by_name(changes, message):
    with pytest.raises(InvalidArgumentError, match=message):
        LlamaConfig.from_hf(changed(**changes))


def test_missing_size_is_named():
    with pytest.raises(InvalidArgumentError, match="intermediate_size"):
        LlamaConfig.from_hf({k: v for k, v in LLAMA31.items() if k != "intermediate_size"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_kv_heads": 4}, "multiple of n_kv_heads"),
        ({"head_dim": 7}, "even"),
        ({"n_layers": 0}, "n_layers must be a positive int"),
        ({"vocab_size": 9.0}, "vocab_size"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"rms_eps": -1e-5}, "rms_eps"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"kv_dtype": "float8"}, "kv_dtype must be one of"),
        ({"rope_scaling": {"factor": 2.0}}, "must be a RopeScaling"),
        ({"eos_token_ids": 2}, "tuple of ints"),
    ],
)
def test_invalid_field_is_named(changes, message):
    with pytest.raises(InvalidArgumentError, match=message):
        dataclasses.replace(GQA, **changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ntk", 2.0), "ntk"),
        (("linear", 0.5), "at least 1"),
        (("llama3", 8.0, 1.0, 4.0), "original_max_position_embeddings"),
        (("llama3", 8.0, 4.0, 4.0, 8192), "must exceed"),
    ],
)
def test_invalid_rope_scaling_is_named(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        RopeScaling(*arguments)


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"), [("float32", "float16"), ("float16", "float16"), ("bfloat16", "bfloat16")]
)
def test_cache_dtype_follows_the_model_dtype(dtype, kv_dtype):
    assert dataclasses.replace(GQA, dtype=dtype, kv_dtype=None).kv_dtype == kv_dtype


@pytest.mark.parametrize("name", ["llama31_8b", "llama32_1b", "smollm2_135m", "tinyllama_1b"])
def test_named_config_is_valid_and_hashable(name):
    config = getattr(LlamaConfig, name)()
    assert hash(config) == hash(dataclasses.replace(config))
