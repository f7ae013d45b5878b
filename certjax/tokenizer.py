"""The tokenizer that travels with a checkpoint: text to ids and back, and the model's chat template."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2.sandbox
import tokenizers

from certjax.errors import InvalidArgumentError


class Tokenizer:
    """A `tokenizers.Tokenizer` with the chat template of its `tokenizer_config.json`.

    Parameters
    ----------
    directory
        Holds `tokenizer.json` and, optionally, `tokenizer_config.json`.

    Raises
    ------
    InvalidArgumentError
        If a file is damaged.
    """

    def __init__(self, directory: Path):
        config_file = directory / "tokenizer_config.json"
        self._tokenizer = _read(directory / "tokenizer.json", lambda f: tokenizers.Tokenizer.from_file(str(f)))
        self._config = _read(config_file, lambda f: json.loads(f.read_text())) if config_file.exists() else {}

    @property
    def vocab_size(self) -> int:
        """Ids, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with a beginning-of-sequence token where the model wants one."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        bos = self._token(self._config.get("bos_token"))
        if self._config.get("add_bos_token") and bos is not None:
            bos_id = self._tokenizer.token_to_id(bos)
            ids = ids if ids[:1] == [bos_id] else [bos_id, *ids]
        return ids

    def decode(self, ids) -> str:
        """Text of ids, special tokens left out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model is a chat model by its own configuration."""
        return bool(self._config.get("chat_template"))

    def chat(self, messages: str | list[dict[str, str]]) -> str:
        """A prompt for the model's turn, from a user's message or a list of `{"role", "content"}`.

        Raises
        ------
        InvalidArgumentError
            If the model has no chat template.
        """
        if not self.has_chat_template:
            raise InvalidArgumentError("this model has no chat template; pass chat=False to prompt it as it is.")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string(self._config["chat_template"])
        special = {k: self._token(self._config.get(k)) or "" for k in ("bos_token", "eos_token")}
        return template.render(messages=messages, add_generation_prompt=True, **special)

    @staticmethod
    def _token(entry) -> str | None:
        """A special token is stored as a string or as an added-token record."""
        return entry["content"] if isinstance(entry, dict) else entry


def _read(file: Path, reader: Callable[[Path], Any]) -> Any:
    try:
        return reader(file)
    except Exception as error:  # `tokenizers` raises plain Exception
        raise InvalidArgumentError(f"{file} cannot be read ({error}); convert the source again.") from error
