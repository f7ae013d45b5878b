"""What a reader of one checkpoint format offers the converter."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from checkpoints_tools.names import Rule


@dataclass(frozen=True)
class TensorInfo:
    """Shape (slowest axis first) and the NumPy dtype that :meth:`Source.read` returns."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass(frozen=True)
class TokenizerFiles:
    """Contents of `tokenizer.json` (text) and of `tokenizer_config.json` (dict)."""

    tokenizer_json: str
    tokenizer_config: dict[str, Any]


class Source(Protocol):
    """One open checkpoint. Opening reads headers only; tensors are read one at a time.

    Attributes
    ----------
    path : Path
        The HF directory or GGUF file.
    kind : str
        "huggingface" or "gguf".
    config : dict
        Normalised configuration.
    rules : tuple of Rule
        The name table of the format.
    tensors : mapping
        `{name: TensorInfo}` of every tensor.
    files : tuple of Path
        The files that the conversion depends on, for the manifest.
    """

    path: Path
    kind: str
    config: dict[str, Any]
    rules: tuple[Rule, ...]
    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]

    def read(self, name: str) -> np.ndarray:
        """Return tensor `name`, shape and dtype as its :class:`TensorInfo` says."""
        ...

    def tokenizer(self) -> TokenizerFiles:
        """Return the tokenizer; raises TokenizerError where there is none that can be written."""
        ...
