import json

import numpy as np
import pytest

from checkpoints_tools import (
    ConfigError,
    MissingShardError,
    NotACheckpointError,
    TensorMismatchError,
    TokenizerError,
    TruncatedFileError,
    UnknownArchitectureError,
    UnsupportedTensorError,
    convert,
    restore,
)
from checkpoints_tools.config import normalise_config
from checkpoints_tools.sources import open_source
from tests.checkpoints_tools.builders import tiny_config, write_hf


def test_missing_shard_is_named(tmp_path, config, weights):
    directory = write_hf(tmp_path / "hf", config, weights, shards=3)
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(MissingShardError, match="model-00002-of-00003.safetensors"):
        open_source(directory)


def test_shards_without_their_index_are_reported(tmp_path, config, weights):
    directory = write_hf(tmp_path / "hf", config, weights, shards=2)
    (directory / "model.safetensors.index.json").unlink()
    with pytest.raises(MissingShardError, match="no model.safetensors.index.json"):
        open_source(directory)


def test_index_that_contradicts_its_shards_is_refused(tmp_path, config, weights):
    directory = write_hf(tmp_path / "hf", config, weights, shards=2)
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())["weight_map"]
    moved = index | {"model.norm.weight": "model-00001-of-00002.safetensors"}
    assert moved != index
    file.write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(TensorMismatchError, match="model.norm.weight"):
        open_source(directory)
    file.write_text(json.dumps({"weight_map": index | {"ghost.weight": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(TensorMismatchError, match="ghost.weight"):
        open_source(directory)


@pytest.mark.parametrize("keep", [0, 4, 100, -4])
def test_truncated_safetensors_is_reported_before_anything_is_written(tmp_path, hf_directory, keep):
    file = hf_directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(TruncatedFileError, match="model.safetensors is truncated"):
        convert(hf_directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_directory_that_is_no_checkpoint_is_refused(tmp_path, hf_directory):
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotACheckpointError, match="no config.json"):
        open_source(tmp_path / "empty")
    (hf_directory / "model.safetensors").unlink()
    with pytest.raises(NotACheckpointError, match="safe_serialization=True"):
        open_source(hf_directory)


def test_path_that_is_missing_or_another_file_is_refused(tmp_path, hf_directory):
    with pytest.raises(NotACheckpointError, match="does not exist"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(NotACheckpointError, match="pass the directory"):
        open_source(hf_directory / "model.safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
        {"architectures": None, "model_type": "qwen2"},
        {"quantization_config": {"quant_method": "gptq"}},
        {"hidden_act": "gelu"},
    ],
)
def test_other_architectures_are_refused(changes):
    with pytest.raises(UnknownArchitectureError, match="config.json"):
        normalise_config(tiny_config(**changes), "config.json")


@pytest.mark.parametrize(
    "changes", [{"hidden_size": None}, {"num_hidden_layers": 0}, {"vocab_size": "many"}, {"num_key_value_heads": 3}]
)
def test_impossible_sizes_are_refused_by_name(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        normalise_config(tiny_config(**changes), "config.json")


def test_absent_head_counts_are_derived():
    config = tiny_config(num_key_value_heads=None, head_dim=None)
    normal = normalise_config(config, "config.json")
    assert (normal["num_key_value_heads"], normal["head_dim"]) == (4, 16)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("stated", "theta", "scaling"),
    [
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, 5e5, LLAMA3),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "dtype": "bfloat16"}, 5e5, LLAMA3),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, 1e5, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 1e4, {"rope_type": "linear", "factor": 2.0}),
        ({}, 1e4, None),
    ],
)
def test_rotary_settings_have_one_spelling(stated, theta, scaling):
    config = tiny_config()
    del config["rope_theta"], config["rope_scaling"]
    normal = normalise_config(config | stated, "config.json")
    assert (normal["rope_theta"], normal["rope_scaling"]) == (theta, scaling)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_config_that_is_no_json_object_is_refused(hf_directory, text):
    (hf_directory / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="config.json"):
        open_source(hf_directory)


def test_tensor_of_an_integer_type_is_refused_by_name(tmp_path, config, weights):
    name = "model.norm.weight"
    write_hf(tmp_path / "hf", config, weights | {name: weights[name].astype(np.int8)})
    with pytest.raises(UnsupportedTensorError, match="model.norm.weight is stored as I8"):
        convert(tmp_path / "hf", tmp_path / "out", progress=False)


def test_tokenizer_is_copied_and_its_configuration_completed(hf_directory, converted):
    assert (converted / "tokenizer.json").read_text() == (hf_directory / "tokenizer.json").read_text()
    stated = json.loads((converted / "tokenizer_config.json").read_text())
    assert stated == {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": None, "add_bos_token": False}


def test_chat_template_file_joins_the_configuration(tmp_path, hf_directory):
    (hf_directory / "chat_template.jinja").write_text("{{ messages }}")
    directory = convert(hf_directory, tmp_path / "out", progress=False)
    assert json.loads((directory / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"


def test_missing_or_damaged_tokenizer_is_reported(tmp_path, hf_directory):
    file = hf_directory / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(TokenizerError, match="tokenizer.json is not"):
        convert(hf_directory, tmp_path / "out")
    file.unlink()
    with pytest.raises(TokenizerError, match="save_pretrained"):
        convert(hf_directory, tmp_path / "out")


@pytest.mark.parity
def test_parameters_are_those_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = tiny_config(tie_word_embeddings=False, attention_bias=True)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    write_hf(tmp_path / "hf", config, {})
    model.save_pretrained(tmp_path / "hf")
    restored = restore(convert(tmp_path / "hf", tmp_path / "out", progress=False))
    x = np.random.default_rng(0).standard_normal((3, 64), dtype=np.float32)
    q_proj = model.model.layers[1].self_attn.q_proj
    ours = {key: np.asarray(leaf[1]) for key, leaf in restored.params["layers"]["attn"]["q_proj"].items()}
    with torch.no_grad():
        theirs = q_proj(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(x @ ours["kernel"] + ours["bias"], theirs, rtol=1e-5, atol=1e-5)
    assert restored.config["rope_theta"] == config["rope_theta"]
