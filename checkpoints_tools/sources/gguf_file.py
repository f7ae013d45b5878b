"""A GGUF file of the `llama` architecture; every quantization that the `gguf` package decodes is read as float32."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from checkpoints_tools.errors import (
    MissingShardError,
    NotACheckpointError,
    TruncatedFileError,
    UnsupportedTensorError,
)
from checkpoints_tools.names import GGUF_RULES
from checkpoints_tools.sources.contract import TensorInfo, TokenizerFiles
from checkpoints_tools.sources.gguf_config import read_config
from checkpoints_tools.sources.gguf_tokenizer import build_tokenizer

_MAGIC = b"GGUF"


class GGUFSource:
    """See :class:`checkpoints_tools.sources.contract.Source`.

    Raises
    ------
    NotACheckpointError
        The file does not begin as a GGUF file does.
    TruncatedFileError
        It ends before the data that its header announces, or the header cannot be parsed.
    MissingShardError
        It is one part of a split model.
    UnsupportedTensorError
        It is of the other byte order.
    UnknownArchitectureError, ConfigError
        As their names say.
    """

    kind = "gguf"
    rules = GGUF_RULES

    def __init__(self, path: Path):
        self.path = path
        self.files = (path,)
        reader = _open(path)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(tuple(int(n) for n in reversed(tensor.shape)), np.dtype(np.float32))
            for name, tensor in self._tensors.items()
        }
        self._metadata: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
        if self._metadata.get("split.count", 1) > 1:
            raise MissingShardError(
                f"{path} is part {self._metadata.get('split.no', 0) + 1} of {self._metadata['split.count']} of a "
                f"split model. "
                "Merge the parts first: llama-gguf-split --merge <first part> <output>."
            )
        factors = self.read("rope_freqs.weight") if "rope_freqs.weight" in self.tensors else None
        shapes = {name: info.shape for name, info in self.tensors.items()}
        self.config = read_config(self._metadata, shapes, factors, str(path))

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether the file at `path` begins as a GGUF file does."""
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC

    def read(self, name: str) -> np.ndarray:
        """Return tensor `name` as float32; raises UnsupportedTensorError for a type that `gguf` cannot decode."""
        tensor = self._tensors[name]
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UnsupportedTensorError(
                f"{self.path}: {name} is stored as {tensor.tensor_type.name}, which the installed gguf package does "
                f"not "
                "decode. Upgrade it (pip install -U gguf), or use a file with another quantization, such as Q8_0."
            ) from error
        return values.reshape(self.tensors[name].shape)

    def tokenizer(self) -> TokenizerFiles:
        """Return the tokenizer that the metadata describes."""
        return build_tokenizer(self._metadata, str(self.path))


def _open(path: Path) -> gguf.GGUFReader:
    if not GGUFSource.recognises(path):
        raise NotACheckpointError(f"{path} does not begin with the bytes 'GGUF'. Pass a GGUF file.")
    try:
        reader = gguf.GGUFReader(path)
    # The reader slices a memory map without looking at its length, so a short file surfaces as any of these.
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise TruncatedFileError(
            f"{path} is truncated or damaged, or of a GGUF version or tensor type that the installed gguf package "
            f"does not "
            f"know ({error}); it is {path.stat().st_size} bytes long. Download it again, or upgrade gguf."
        ) from error
    if reader.byte_order == "S":
        raise UnsupportedTensorError(
            f"{path} is of the other byte order than this machine, and its blocks would decode to noise. "
            "Convert it with gguf-convert-endian."
        )
    return reader
