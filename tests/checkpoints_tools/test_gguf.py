import gguf
import numpy as np
import pytest

from checkpoints_tools import (
    ConfigError,
    MissingShardError,
    TensorMismatchError,
    TruncatedFileError,
    UnknownArchitectureError,
    UnsupportedTensorError,
    convert,
    restore,
)
from checkpoints_tools.names import unpermute
from checkpoints_tools.sources import open_source
from checkpoints_tools.sources.gguf_rope import llama3_factors
from checkpoints_tools.tree import flatten
from tests.checkpoints_tools.builders import expected_params, permute, tiny_config, write_gguf


@pytest.mark.parametrize("quantization", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantized_weights_are_those_that_gguf_decodes(tmp_path, config, weights, quantization):
    kind = gguf.GGMLQuantizationType[quantization]

    def stored(weight):
        return weight if weight.ndim == 1 else gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)

    # Rows are quantized one by one, so permuting them commutes with it.
    decoded = {name: stored(weight) for name, weight in weights.items()}
    source = write_gguf(tmp_path / "model.gguf", config, weights, quantization)
    params = flatten(restore(convert(source, tmp_path / "out", progress=False)).params)
    for path, expected in expected_params(config, decoded).items():
        np.testing.assert_array_equal(np.asarray(params[path]), expected, err_msg=path)


@pytest.mark.parametrize("shape", [(24,), (24, 5)])
def test_unpermute_undoes_the_interleaving(shape):
    weight = np.arange(np.prod(shape)).reshape(shape)
    assert not np.array_equal(permute(weight, 3), weight)
    np.testing.assert_array_equal(unpermute(permute(weight, 3), 3), weight)


def test_configuration_is_the_one_that_was_written(tmp_path, config, weights):
    read = open_source(write_gguf(tmp_path / "model.gguf", config, weights)).config
    assert {key: read[key] for key in config} == config


@pytest.mark.parametrize("keep", [4, 20, 200, 5000, -64])
def test_truncated_gguf_is_reported(tmp_path, config, weights, keep):
    source = write_gguf(tmp_path / "model.gguf", config, weights)
    source.write_bytes(source.read_bytes()[:keep])
    with pytest.raises(TruncatedFileError, match="model.gguf is truncated"):
        open_source(source)


def test_other_architecture_is_refused(tmp_path, config, weights):
    with pytest.raises(UnknownArchitectureError, match="'qwen2'"):
        open_source(write_gguf(tmp_path / "model.gguf", config, weights, architecture="qwen2"))


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"llama.expert_count": 8}, UnknownArchitectureError, "8 experts"),
        ({"llama.rope.dimension_count": 8}, UnknownArchitectureError, "rotates 8 of 16"),
        ({"split.count": 3, "split.no": 1}, MissingShardError, "part 2 of 3"),
        ({"llama.rope.scaling.type": "longrope"}, ConfigError, "longrope"),
    ],
)
def test_metadata_that_cannot_be_honoured_is_refused(tmp_path, config, weights, keys, error, message):
    with pytest.raises(error, match=message):
        open_source(write_gguf(tmp_path / "model.gguf", config, weights, keys=keys))


def test_linear_rope_scaling_is_kept(tmp_path, config, weights):
    keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    source = write_gguf(tmp_path / "model.gguf", config, weights, keys=keys)
    assert open_source(source).config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_unexpected_tensor_is_named(tmp_path, config, weights):
    source = write_gguf(
        tmp_path / "model.gguf", config, weights, extra={"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}
    )
    with pytest.raises(TensorMismatchError, match="blk.0.attn_q_norm.weight"):
        convert(source, tmp_path / "out", progress=False)


def test_type_without_a_decoder_is_refused_by_name(tmp_path, config, weights):
    norm = weights.pop("model.norm.weight")
    source = write_gguf(tmp_path / "model.gguf", config, weights, extra={"output_norm.weight": norm.astype(np.int32)})
    with pytest.raises(UnsupportedTensorError, match="output_norm.weight is stored as I32"):
        convert(source, tmp_path / "out", progress=False)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recovered_from_the_stored_factors(tmp_path, config, weights, factor):
    factors = llama3_factors(500000.0, 16, factor, 1.0, 4.0, 8192).astype(np.float32)
    source = write_gguf(tmp_path / "model.gguf", config, weights, extra={"rope_freqs.weight": factors})
    restored = restore(convert(source, tmp_path / "out", progress=False))
    assert restored.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_factors_of_one_mean_no_scaling(tmp_path, config, weights):
    source = write_gguf(tmp_path / "model.gguf", config, weights, extra={"rope_freqs.weight": np.ones(8, np.float32)})
    assert open_source(source).config["rope_scaling"] is None


@pytest.mark.parametrize(
    "factors", [np.linspace(1, 8, 8), np.full(7, 8.0), llama3_factors(5e5, 16, 8.0, 2.0, 4.0, 8192)]
)
def test_factors_of_no_known_rule_are_refused(tmp_path, config, weights, factors):
    extra = {"rope_freqs.weight": factors.astype(np.float32)}
    with pytest.raises(ConfigError, match="cannot be derived"):
        open_source(write_gguf(tmp_path / "model.gguf", config, weights, extra=extra))


@pytest.mark.parity
def test_llama3_factors_are_those_of_transformers():
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    }
    config = transformers.LlamaConfig(
        **tiny_config(head_dim=128, max_position_embeddings=131072, rope_parameters=scaling)
    )
    theirs = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].numpy()
    plain = 500000.0 ** (-np.arange(0, 128, 2) / 128)
    ours = llama3_factors(500000.0, 128, 8.0, 1.0, 4.0, 8192)
    np.testing.assert_allclose(plain / ours, theirs, rtol=1e-5)
