"""GGUF metadata -> an HF `LlamaConfig`-style dict."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from checkpoints_tools.config import normalise_config
from checkpoints_tools.errors import ConfigError, UnknownArchitectureError
from checkpoints_tools.sources.gguf_rope import llama3_scaling

# HF key -> metadata key under "llama."
_SIZES = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
}
_TOKEN_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def read_config(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], rope_factors: np.ndarray | None, file: str
) -> dict[str, Any]:
    """Return the normalised configuration of a GGUF file.

    Parameters
    ----------
    metadata : mapping
        Key-value pairs of the file.
    shapes : mapping
        `{tensor name: shape}`: what the file stores decides vocabulary size, tying and biases, which no key states
        reliably.
    rope_factors : array, [d/2], or None
        `rope_freqs.weight`, where present.
    file : str
        For messages.

    Raises
    ------
    UnknownArchitectureError
        Not `llama`, a mixture of experts, or rotary embeddings over part of a head.
    ConfigError
        A key is missing, or `rope_factors` follow no rule that HF can express.
    """
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UnknownArchitectureError(
            f"{file} is of architecture {architecture!r}; only 'llama' can be converted. Use a LLaMA-family model."
        )
    if metadata.get("llama.expert_count", 0):
        raise UnknownArchitectureError(
            f"{file} is a mixture of {metadata['llama.expert_count']} experts; only dense models can be converted."
        )
    missing = [f"llama.{key}" for key in _SIZES.values() if f"llama.{key}" not in metadata]
    if "token_embd.weight" not in shapes:
        missing.append("the tensor token_embd.weight")
    if missing:
        raise ConfigError(
            f"{file} lacks {', '.join(missing)}. Download it again, or write it with a current converter."
        )

    config: dict[str, Any] = {key: metadata[f"llama.{name}"] for key, name in _SIZES.items()}
    config |= {key: metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in _TOKEN_IDS.items()}
    per_layer = [key for key, value in config.items() if isinstance(value, list)]
    if per_layer:
        raise UnknownArchitectureError(
            f"{file} varies {', '.join(per_layer)} by layer. Use a model with uniform layers."
        )
    config["architectures"] = ["LlamaForCausalLM"]
    config["vocab_size"] = shapes["token_embd.weight"][0]
    config["num_key_value_heads"] = metadata.get("llama.attention.head_count_kv", config["num_attention_heads"])
    config["head_dim"] = metadata.get(
        "llama.attention.key_length", config["hidden_size"] // config["num_attention_heads"]
    )
    config["rms_norm_eps"] = _shortest(metadata.get("llama.attention.layer_norm_rms_epsilon", 1e-5))
    config["rope_theta"] = _shortest(metadata.get("llama.rope.freq_base", 10000.0))
    config["rope_scaling"] = _rope_scaling(metadata, rope_factors, config, file)
    config["tie_word_embeddings"] = "output.weight" not in shapes
    config["attention_bias"] = "blk.0.attn_q.bias" in shapes
    config["mlp_bias"] = "blk.0.ffn_down.bias" in shapes
    rotary = metadata.get("llama.rope.dimension_count", config["head_dim"])
    if rotary != config["head_dim"]:
        raise UnknownArchitectureError(
            f"{file} rotates {rotary} of {config['head_dim']} head dimensions; a LLaMA decoder rotates all of them."
        )
    return normalise_config(config, file)


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: GGUF stores 1e-5 as 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(
    metadata: Mapping[str, Any], factors: np.ndarray | None, config: Mapping[str, Any], file: str
) -> dict[str, Any] | None:
    original = metadata.get("llama.rope.scaling.original_context_length")
    if factors is not None:
        return llama3_scaling(factors, config["rope_theta"], config["head_dim"], original, file)
    kind = metadata.get("llama.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ConfigError(
            f"{file} has rope scaling {kind!r}; none, linear, yarn and llama3 can be expressed. Convert the HF "
            f"directory."
        )
    scaling = {"rope_type": kind, "factor": float(metadata.get("llama.rope.scaling.factor", 1.0))}
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    return scaling
