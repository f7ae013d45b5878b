"""Build `tokenizer.json` from GGUF metadata, for byte-level BPE vocabularies (`tokenizer.ggml.model` = "gpt2").

GGUF keeps the vocabulary, the merges and the *name* of the rule that cuts text before the merges apply. The rule
itself lives in llama.cpp; `_PRE_TOKENIZERS` restates those that LLaMA-family models use, in terms of the `tokenizers`
package.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from checkpoints_tools.errors import TokenizerError
from checkpoints_tools.sources.contract import TokenizerFiles

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> pre_tokenizers.PreTokenizer:
    # Digits go first: in "a  1" the two spaces then end their piece and merge, which the GPT-2 rule alone would
    # prevent.
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _llama3() -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated"), byte_level])


@dataclass(frozen=True)
class _Rule:
    pre_tokenizer: Callable[[], pre_tokenizers.PreTokenizer]
    # LLaMA 3 takes a piece that is a whole token as it is, even where the merges would not build it.
    ignore_merges: bool = False
    # What an absent `add_bos_token` means.
    adds_bos: bool = False


_LLAMA3 = _Rule(_llama3, ignore_merges=True, adds_bos=True)
_PRE_TOKENIZERS = {
    "smollm": _Rule(_smollm),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "gpt-2": _Rule(_gpt2),
}


def build_tokenizer(metadata: Mapping[str, Any], file: str) -> TokenizerFiles:
    """Return the tokenizer that `metadata` describes; token ids are positions in `tokenizer.ggml.tokens`.

    Raises
    ------
    TokenizerError
        No tokenizer, not a byte-level BPE one, or of a pre-tokenizer not in the table.
    """
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    remedy = "Convert the HF directory of the same model, which carries its tokenizer.json."
    if model != "gpt2":
        raise TokenizerError(f"{file} has tokenizer {model!r}; only byte-level BPE ('gpt2') can be rebuilt. {remedy}")
    if pre not in _PRE_TOKENIZERS:
        known = ", ".join(_PRE_TOKENIZERS)
        raise TokenizerError(f"{file} has pre-tokenizer {pre!r}; known: {known}. {remedy}")
    absent = [key for key in ("tokens", "merges") if not metadata.get(f"tokenizer.ggml.{key}")]
    if absent:
        raise TokenizerError(f"{file} lacks {' and '.join(f'tokenizer.ggml.{key}' for key in absent)}. {remedy}")

    rule, tokens = _PRE_TOKENIZERS[pre], metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise TokenizerError(f"{file} repeats {len(tokens) - len(vocabulary)} tokens, so ids would be lost. {remedy}")
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=rule.ignore_merges))
    tokenizer.pre_tokenizer = rule.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    _add_whole_tokens(tokenizer, tokens, metadata.get("tokenizer.ggml.token_type") or ())

    config = _config(metadata, tokens, rule)
    tokenizer.post_processor = _post_processor(config, metadata)
    return TokenizerFiles(tokenizer.to_str(), config)


def _add_whole_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Keep control tokens (skipped when decoding) and user-defined ones from being cut into pieces."""
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        found = [t for t, token_type in zip(tokens, types, strict=False) if token_type == kind]
        added = [AddedToken(token, normalized=False, special=special) for token in found]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)


def _config(metadata: Mapping[str, Any], tokens: list[str], rule: _Rule) -> dict[str, Any]:
    def token(role: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{role}_token_id")
        return None if index is None else tokens[index]

    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "unk_token": token("unknown"),
        "pad_token": token("padding"),
        "add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", rule.adds_bos)) and token("bos") is not None,
        "add_eos_token": bool(metadata.get("tokenizer.ggml.add_eos_token", False)) and token("eos") is not None,
        "chat_template": metadata.get("tokenizer.chat_template"),
    }


def _post_processor(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> processors.PostProcessor:
    """Offsets as byte-level BPE has them, and the bos/eos tokens that the file says a text is wrapped in."""
    byte_level = processors.ByteLevel(trim_offsets=False)
    ends = [config[f"{role}_token"] if config[f"add_{role}_token"] else None for role in ("bos", "eos")]
    if ends == [None, None]:
        return byte_level
    ids = [metadata[f"tokenizer.ggml.{role}_token_id"] for role in ("bos", "eos") if config[f"add_{role}_token"]]
    special = list(dict(zip([end for end in ends if end], ids, strict=True)).items())
    single = [part for part in (ends[0], "$A", ends[1]) if part]
    return processors.Sequence([byte_level, processors.TemplateProcessing(single=single, special_tokens=special)])
