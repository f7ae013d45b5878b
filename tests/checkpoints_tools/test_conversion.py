import json
import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest

import checkpoints_tools.conversion
from checkpoints_tools import (
    CheckpointError,
    OutputExistsError,
    TensorMismatchError,
    UnsupportedTensorError,
    convert,
    restore,
)
from checkpoints_tools.tree import flatten
from tests.checkpoints_tools.builders import expected_params, hf_weights, tiny_config, write_gguf, write_hf

SHAPES = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "attention bias": {"attention_bias": True},
    "all biases, untied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "head_dim apart from hidden/heads": {"head_dim": 8},
}


def assert_params_are(directory, expected):
    params = flatten(restore(directory, verify=True).params)
    assert params.keys() == expected.keys()
    for path, leaf in params.items():
        np.testing.assert_array_equal(np.asarray(leaf), expected[path], err_msg=path)


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_every_leaf_survives_the_round_trip(tmp_path, changes):
    config = tiny_config(**changes)
    weights = hf_weights(config)
    write_hf(tmp_path / "hf", config, weights)
    write_gguf(tmp_path / "model.gguf", config, weights)
    for source in ("hf", "model.gguf"):
        directory = convert(tmp_path / source, tmp_path / f"from_{source}", progress=False)
        assert_params_are(directory, expected_params(config, weights))


def test_shards_give_what_one_file_gives(tmp_path, config, weights, converted):
    write_hf(tmp_path / "sharded", config, weights, shards=3)
    directory = convert(tmp_path / "sharded", tmp_path / "from_shards", progress=False)
    assert_params_are(directory, flatten(restore(converted).params))


def test_progress_bar_changes_nothing(tmp_path, hf_directory, config, weights):
    assert_params_are(convert(hf_directory, tmp_path / "out", progress=True), expected_params(config, weights))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_dtype_is_the_rounding_of_the_source(tmp_path, hf_directory, config, weights, name):
    directory = convert(hf_directory, tmp_path / "out", dtype=name, progress=False)
    assert_params_are(directory, {p: w.astype(name) for p, w in expected_params(config, weights).items()})
    assert restore(directory).config["torch_dtype"] == name


def test_source_dtype_keeps_bfloat16(tmp_path, config, weights):
    stored = {name: weight.astype(ml_dtypes.bfloat16) for name, weight in weights.items()}
    write_hf(tmp_path / "hf", config, stored)
    directory = convert(tmp_path / "hf", tmp_path / "out", dtype="source", progress=False)
    assert_params_are(directory, expected_params(config, stored))


def test_source_dtype_refuses_layers_of_different_types(tmp_path, config, weights):
    name = "model.layers.1.mlp.up_proj.weight"
    write_hf(tmp_path / "hf", config, weights | {name: weights[name].astype(np.float16)})
    with pytest.raises(UnsupportedTensorError, match=r"layers/mlp/up_proj/kernel.*dtype='float32'"):
        convert(tmp_path / "hf", tmp_path / "out", dtype="source", progress=False)


def test_float16_refuses_values_that_would_overflow(tmp_path, config, weights):
    weights["model.norm.weight"][3] = 1e6
    write_hf(tmp_path / "hf", config, weights)
    with pytest.raises(UnsupportedTensorError, match=r"model\.norm\.weight.*bfloat16"):
        convert(tmp_path / "hf", tmp_path / "out", dtype="float16", progress=False)


def test_unknown_dtype_is_refused_by_name(tmp_path, hf_directory):
    with pytest.raises(CheckpointError, match="dtype is 'int8'"):
        convert(hf_directory, tmp_path / "out", dtype="int8")


def test_every_missing_unexpected_and_wrong_tensor_is_listed(tmp_path, config, weights):
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        del weights[name]
    weights["model.layers.0.self_attn.q_norm.weight"] = np.zeros(16, np.float32)
    weights["model.layers.2.input_layernorm.weight"] = np.zeros(64, np.float32)
    weights["model.embed_tokens.weight"] = np.zeros((10, 64), np.float32)
    write_hf(tmp_path / "hf", config, weights)
    with pytest.raises(TensorMismatchError) as caught:
        convert(tmp_path / "hf", tmp_path / "out", progress=False)
    for part in (
        "final_norm/scale",
        "layers/mlp/up_proj/kernel layer 1",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.2.input_layernorm.weight",
        "model.embed_tokens.weight: stored [10, 64], expected [288, 64]",
    ):
        assert part in str(caught.value)


def test_known_buffers_are_ignored_and_recorded(tmp_path, config, weights):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    write_hf(tmp_path / "hf", config, weights | {name: np.zeros(8, np.float32)})
    directory = convert(tmp_path / "hf", tmp_path / "out", progress=False)
    assert name in json.loads((directory / "manifest.json").read_text())["ignored"]


def test_tied_head_is_dropped_only_where_it_is_the_embedding(tmp_path, config, weights):
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    write_hf(tmp_path / "same", config, weights)
    assert "lm_head" not in restore(convert(tmp_path / "same", tmp_path / "out", progress=False)).params
    weights["lm_head.weight"][0, 0] += 1
    write_hf(tmp_path / "differs", config, weights)
    with pytest.raises(TensorMismatchError, match="tie_word_embeddings to false"):
        convert(tmp_path / "differs", tmp_path / "out2", progress=False)


def test_existing_output_is_kept_unless_overwrite(hf_directory, converted):
    with pytest.raises(OutputExistsError, match="overwrite=True"):
        convert(hf_directory, converted)
    convert(hf_directory, converted, dtype="bfloat16", overwrite=True, progress=False)
    assert restore(converted, verify=True).config["torch_dtype"] == "bfloat16"
    assert [p.name for p in converted.parent.iterdir() if p.name.startswith(".")] == []


def test_overwrite_never_deletes_what_convert_did_not_write(tmp_path, hf_directory):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(OutputExistsError, match="not written by convert"):
        convert(hf_directory, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_failed_overwrite_keeps_the_earlier_conversion(hf_directory, converted, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints_tools.conversion.manifest, "write_manifest", fail)
    with pytest.raises(KeyboardInterrupt):
        convert(hf_directory, converted, overwrite=True, progress=False)
    restore(converted, verify=True)
    assert sorted(p.name for p in converted.parent.iterdir()) == ["hf", "out"]


def test_killed_conversion_leaves_no_output(tmp_path, hf_directory):
    script = """
        import os, signal, sys
        import checkpoints_tools.conversion as conversion
        # Killed where everything but the manifest is on disk: no handler runs, nothing is cleaned up.
        conversion.manifest.write_manifest = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
        conversion.convert(sys.argv[1], sys.argv[2], progress=False)
    """
    output = tmp_path / "out"
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script), hf_directory, output], capture_output=True)
    assert run.returncode == -9, run.stderr.decode()
    assert not output.exists()
    (left,) = tmp_path.glob(".out.partial-*")
    with pytest.raises(CheckpointError, match="no finished conversion"):
        restore(left)
    restore(convert(hf_directory, output, progress=False), verify=True)


def test_manifest_describes_source_leaves_and_packages(converted):
    manifest = json.loads((converted / "manifest.json").read_text())
    files = {file["name"]: file for file in manifest["source"]["files"]}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    assert len(files["config.json"]["sha256"]) == 64
    assert manifest["leaves"]["layers/attn/k_proj/kernel"]["shape"] == [2, 64, 32]
    assert manifest["leaves"]["layers/attn/k_proj/kernel"]["dtype"] == "float32"
    assert {"jax", "orbax-checkpoint"} <= manifest["packages"].keys()


def test_package_does_not_import_the_library_that_uses_it():
    code = "import sys, checkpoints_tools; sys.exit('certjax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
