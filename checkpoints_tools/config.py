"""One spelling for a LLaMA configuration, whichever version of the HF format wrote it."""

from collections.abc import Mapping
from typing import Any

from checkpoints_tools.errors import ConfigError, UnknownArchitectureError

# The defaults are those of HF `LlamaConfig`, for keys that older files leave out.
_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


def normalise_config(raw: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Return `raw` as a `LlamaConfig`-style dict with every key that the rest of the package reads.

    Newer HF files keep the rotary settings under `rope_parameters` and the type under `dtype`; older ones under
    `rope_theta` + `rope_scaling` and `torch_dtype`. The result uses the older spelling only.

    Parameters
    ----------
    raw : mapping
        The contents of `config.json`, or the equivalent read from GGUF metadata.
    file : str
        Where `raw` came from, for messages.

    Returns
    -------
    dict
        Sizes are positive ints; `head_dim` and `num_key_value_heads` are always present; `rope_scaling` is None or a
        dict with `rope_type`.

    Raises
    ------
    UnknownArchitectureError
        The model is not a `LlamaForCausalLM`, is quantized, or uses another activation.
    ConfigError
        A key is missing, or sizes contradict one another.
    """
    _check_architecture(raw, file)
    missing = [key for key in _REQUIRED if raw.get(key) is None]
    if missing:
        raise ConfigError(f"{file} lacks {', '.join(missing)}. Add them: nothing else in a checkpoint states them.")

    config = {key: value for key, value in _DEFAULTS.items()} | {key: raw[key] for key in _DEFAULTS if key in raw}
    config |= {key: raw[key] for key in _REQUIRED}
    # Both may be present and null, which HF reads as "derive it".
    config["num_key_value_heads"] = raw.get("num_key_value_heads") or config["num_attention_heads"]
    config["head_dim"] = raw.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    config["rope_theta"], config["rope_scaling"] = _rope(raw)
    config["torch_dtype"] = raw.get("torch_dtype") or raw.get("dtype") or "float32"
    config["architectures"] = ["LlamaForCausalLM"]
    config["model_type"] = "llama"
    _check_sizes(config, file)
    return config


def _rope(raw: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    nested = dict(raw.get("rope_parameters") or {})
    theta = float(nested.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0)
    scaling = nested or dict(raw.get("rope_scaling") or {})
    # `type` is the key's name in files from before LLaMA 3.1.
    kind = scaling.pop("type", None)
    if kind is not None:
        scaling.setdefault("rope_type", kind)
    if scaling.get("rope_type", "default") == "default":
        return theta, None
    return theta, scaling


def _check_architecture(raw: Mapping[str, Any], file: str) -> None:
    architectures = raw.get("architectures") or []
    model_type = raw.get("model_type")
    if architectures and "LlamaForCausalLM" not in architectures or not architectures and model_type != "llama":
        found = ", ".join(architectures) or f"model_type {model_type!r}"
        raise UnknownArchitectureError(
            f"{file} describes {found}; only LlamaForCausalLM can be converted. Use a LLaMA-family checkpoint "
            "(LLaMA 2/3, SmolLM2, TinyLlama)."
        )
    if raw.get("quantization_config"):
        raise UnknownArchitectureError(
            f"{file} has a quantization_config: its tensors are packed. Convert the unquantized checkpoint, or a GGUF "
            f"file."
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise UnknownArchitectureError(
            f"{file} has hidden_act {raw['hidden_act']!r}; a LLaMA decoder uses 'silu'. Use a LLaMA-family checkpoint."
        )


def _check_sizes(config: Mapping[str, Any], file: str) -> None:
    sizes = (*_REQUIRED, "num_key_value_heads", "head_dim")
    bad = [f"{key}={config[key]!r}" for key in sizes if type(config[key]) is not int or config[key] < 1]
    if bad:
        raise ConfigError(f"{file} has {', '.join(bad)}; each must be a positive integer. Correct the file.")
    if config["num_attention_heads"] % config["num_key_value_heads"]:
        raise ConfigError(
            f"{file} has num_attention_heads={config['num_attention_heads']}, not a multiple of "
            f"num_key_value_heads={config['num_key_value_heads']}. Correct the file."
        )
