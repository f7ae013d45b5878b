"""The tokenizer of an HF directory, with what later HF versions moved to other files put back in one place."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from checkpoints_tools.errors import TokenizerError
from checkpoints_tools.sources.contract import TokenizerFiles


def read_tokenizer(path: Path, config: dict[str, Any]) -> TokenizerFiles:
    """Return `tokenizer.json` unchanged and `tokenizer_config.json` with template, bos/eos tokens and `add_bos_token`.

    Raises
    ------
    TokenizerError
        `tokenizer.json` is absent or is not a tokenizer, or the configuration file is no JSON.
    """
    file = path / "tokenizer.json"
    if not file.is_file():
        raise TokenizerError(
            f"{path} has no tokenizer.json. Write one with transformers: "
            "AutoTokenizer.from_pretrained(directory).save_pretrained(directory)."
        )
    text = file.read_text(encoding="utf-8")
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the Rust side raises bare Exception
        raise TokenizerError(f"{file} is not a tokenizers file ({error}). Download it again.") from error
    return TokenizerFiles(text, _complete(_stated(path / "tokenizer_config.json"), path, tokenizer, config))


def _stated(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise TokenizerError(f"{file} is not a JSON object ({error}). Download it again.") from error


def _complete(stated: dict[str, Any], path: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> dict[str, Any]:
    template = path / "chat_template.jinja"
    if template.is_file():
        stated["chat_template"] = template.read_text(encoding="utf-8")
    for role in ("bos", "eos", "pad"):
        token = stated.get(f"{role}_token")
        if isinstance(token, dict):  # an AddedToken, in files from slow tokenizers
            token = token.get("content")
        ids = config[f"{role}_token_id"]
        if token is None and ids is not None:
            token = tokenizer.id_to_token(ids[0] if isinstance(ids, list) else ids)
        stated[f"{role}_token"] = token
    # What tokenizer.json does to an empty text is what it will do to every prompt.
    prefix = tokenizer.encode("").tokens
    stated.setdefault("add_bos_token", stated["bos_token"] is not None and prefix[:1] == [stated["bos_token"]])
    return stated
