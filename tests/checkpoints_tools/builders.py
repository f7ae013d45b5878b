"""Small random checkpoints in both formats, and the parameters tree that each must become.

Weights are made under HF names and HF layout; the GGUF writer permutes and renames them as llama.cpp's converter does,
which is stated here independently of the package's own tables.
"""

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<|bos|>", "<|eos|>"]
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "Ġ"), ("1", "2")]
# Tokens that no merge can build: LLaMA 3 vocabularies have such, and take them whole.
WHOLE = ["xyz"]
TOKENS = SPECIAL + ALPHABET + ["".join(pair) for pair in MERGES] + WHOLE

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tiny_config(**changes):
    """A 2-layer grouped-query configuration whose rows divide into quantization blocks of 32."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "vocab_size": 288,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "float32",
    } | changes


def hf_weights(config, seed=0):
    """Return `{HF name: float32 array}`, kernels `[out, in]`."""
    rng = np.random.default_rng(seed)
    D, F, d = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    attention = {"q": (q, D), "k": (kv, D), "v": (kv, D), "o": (D, q)}
    mlp = {"gate": (F, D), "up": (F, D), "down": (D, F)}
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], D), "model.norm.weight": (D,)}
    for layer in range(config["num_hidden_layers"]):
        stem = f"model.layers.{layer}"
        shapes |= {f"{stem}.{norm}.weight": (D,) for norm in ("input_layernorm", "post_attention_layernorm")}
        for block, linears, bias in (("self_attn", attention, "attention_bias"), ("mlp", mlp, "mlp_bias")):
            for name, shape in linears.items():
                shapes[f"{stem}.{block}.{name}_proj.weight"] = shape
                if config[bias]:
                    shapes[f"{stem}.{block}.{name}_proj.bias"] = shape[:1]
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], D)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def expected_params(config, weights):
    """Return `{path: array}` that the HF `weights` must become."""

    def stack(name):
        return np.stack([weights[f"model.layers.{i}.{name}"] for i in range(config["num_hidden_layers"])])

    expected = {
        "embed/embedding": weights["model.embed_tokens.weight"],
        "final_norm/scale": weights["model.norm.weight"],
        "layers/attn_norm/scale": stack("input_layernorm.weight"),
        "layers/mlp_norm/scale": stack("post_attention_layernorm.weight"),
    }
    linears = [("attn", "self_attn", n) for n in "qkvo"] + [("mlp", "mlp", n) for n in ("gate", "up", "down")]
    for ours, theirs, name in linears:
        expected[f"layers/{ours}/{name}_proj/kernel"] = np.swapaxes(stack(f"{theirs}.{name}_proj.weight"), 1, 2)
        if f"model.layers.0.{theirs}.{name}_proj.bias" in weights:
            expected[f"layers/{ours}/{name}_proj/bias"] = stack(f"{theirs}.{name}_proj.bias")
    if "lm_head.weight" in weights:
        expected["lm_head/kernel"] = weights["lm_head.weight"].T
    return expected


def write_hf(directory, config, weights, shards=1):
    """Write an HF directory with `shards` weight files; returns it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<|bos|>"}}))
    if shards == 1:
        save_file(weights, directory / "model.safetensors")
        return directory
    names = list(weights)
    index = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: weights[name] for name in names[i::shards]}, directory / file)
        index |= dict.fromkeys(names[i::shards], file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return directory


def permute(weight, heads):
    """Reorder rows as llama.cpp's converter does for its interleaved rotary embedding."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path, config, weights, quantization="F32", *, pre="smollm", architecture="llama", extra=None, keys=None, types=None
):
    """Write a GGUF file; `extra` adds tensors, `keys` adds or replaces metadata, `types` replaces token types."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types(types or [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages }}")
    for key, value in (keys or {}).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)
    kind = gguf.GGMLQuantizationType[quantization]
    for name, weight in weights.items():
        if ".q_proj." in name:
            weight = permute(weight, config["num_attention_heads"])
        elif ".k_proj." in name:
            weight = permute(weight, config["num_key_value_heads"])
        for theirs, ours in GGUF_NAMES.items():
            name = name.replace(theirs, ours)
        # As converters do, vectors stay float32.
        if weight.ndim == 1 or quantization == "F32":
            writer.add_tensor(name, np.ascontiguousarray(weight))
        else:
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(weight), kind), raw_dtype=kind)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)
