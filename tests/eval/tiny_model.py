"""A tiny random model that reads and writes bytes, shared by the tests of this folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from certjax import Model
from certjax.models.llama.modeling import init_params
from certjax.tokenizer import Tokenizer
from tests.models import tiny

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<s>", "<|user|>", "<|model|>"]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|model|>"
CONFIG = dataclasses.replace(
    tiny.CONFIGS["wide_heads"], n_layers=2, vocab_size=len(ALPHABET) + len(SPECIAL) + 2, context_length=256
)
CONTEXT = 256
"""All tests use one context, so that they share their programs."""
NAIVE = "naive:codec=int8_int4,sink_tokens=0,recent_tokens=0"
BUDGET = "budget:tolerance=0.1,codec=int8_int4,sink_tokens=0,recent_tokens=0"
TEXT = " ".join(f"Sentence {i} says {i * i} and nothing else." for i in range(60))


def tokenizer(folder: Path, *, bos: bool = False, chat: bool = False) -> Tokenizer:
    """A token for every byte; with a beginning-of-sequence token, or a chat template, where asked for."""
    backend = Backend(BPE(vocab={token: i for i, token in enumerate(SPECIAL + ALPHABET)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.save(str(folder / "tokenizer.json"))
    template = f', "chat_template": "{TEMPLATE}"' if chat else ""
    settings = f'{{"bos_token": "<s>", "add_bos_token": {str(bos).lower()}{template}}}'
    (folder / "tokenizer_config.json").write_text(settings)
    return Tokenizer(folder)


def model(reader: Tokenizer | None = None) -> Model:
    return Model(CONFIG, init_params(CONFIG, jax.random.key(5)), reader, "tiny")
