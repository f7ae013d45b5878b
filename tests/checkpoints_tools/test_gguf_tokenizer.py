import json

import pytest
from tokenizers import Tokenizer

from checkpoints_tools import TokenizerError
from checkpoints_tools.sources import open_source
from tests.checkpoints_tools.builders import TOKENS, write_gguf


@pytest.fixture
def build(tmp_path, config, weights):
    """Return a function that writes a GGUF file with some metadata and reads its tokenizer back."""

    def build(**options):
        files = open_source(write_gguf(tmp_path / "model.gguf", config, weights, **options)).tokenizer()
        return Tokenizer.from_str(files.tokenizer_json), files.tokenizer_config

    return build


def test_ids_are_positions_in_the_file(build):
    tokenizer, _ = build()
    assert [tokenizer.token_to_id(token) for token in TOKENS] == list(range(len(TOKENS)))


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "gpt-2"])
@pytest.mark.parametrize("text", ["hello  world", "12 naïve 😀 你好\n\t x", "<|bos|>hi<|eos|>"])
def test_decoding_gives_back_the_text(build, pre, text):
    tokenizer, _ = build(pre=pre, keys={"tokenizer.ggml.add_bos_token": False})
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_smollm_cuts_digits_before_anything_else(build):
    tokenizer, _ = build(pre="smollm")
    assert tokenizer.encode("12").tokens == ["1", "2"]
    assert tokenizer.encode("he  1").tokens == ["he", "ĠĠ", "1"]


def test_gpt2_keeps_digits_together(build):
    tokenizer, _ = build(pre="gpt-2")
    assert tokenizer.encode("12").tokens == ["12"]
    assert tokenizer.encode("he  1").tokens == ["he", "Ġ", "Ġ", "1"]


def test_llama3_takes_whole_tokens_that_no_merge_builds(build):
    tokenizer, config = build(pre="llama-bpe")
    assert tokenizer.encode("xyz").tokens == ["<|bos|>", "xyz"]
    assert config["add_bos_token"] is True
    assert build(pre="smollm")[0].encode("xyz").tokens == ["x", "y", "z"]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_texts_are_wrapped_as_the_file_says(build, bos, eos):
    keys = {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
    tokenizer, config = build(keys=keys)
    assert tokenizer.encode("he").tokens == ["<|bos|>"] * bos + ["he"] + ["<|eos|>"] * eos
    assert tokenizer.encode("he", add_special_tokens=False).tokens == ["he"]
    assert config["add_bos_token"] is bos
    assert (config["bos_token"], config["eos_token"]) == ("<|bos|>", "<|eos|>")


def test_user_defined_tokens_stay_whole_and_are_decoded(build):
    types = [3, 3] + [4 if token == "xyz" else 1 for token in TOKENS[2:]]
    tokenizer, _ = build(types=types)
    encoding = tokenizer.encode("he xyz")
    assert encoding.tokens == ["he", "Ġ", "xyz"]
    assert tokenizer.decode(encoding.ids) == "he xyz"


def test_chat_template_is_kept(build):
    _, config = build()
    assert config["chat_template"] == "{{ messages }}"
    assert json.loads(json.dumps(config)) == config


def test_unknown_pre_tokenizer_is_refused_by_name(build):
    with pytest.raises(TokenizerError, match=r"'tekken'; known: smollm, llama-bpe.*HF directory"):
        build(pre="tekken")
