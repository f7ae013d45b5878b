"""An HF directory: `config.json`, safetensors (one file, or shards behind an index), tokenizer files."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from checkpoints_tools.config import normalise_config
from checkpoints_tools.errors import (
    ConfigError,
    MissingShardError,
    NotACheckpointError,
    TensorMismatchError,
    TruncatedFileError,
    UnsupportedTensorError,
)
from checkpoints_tools.names import HF_RULES
from checkpoints_tools.sources.contract import TensorInfo, TokenizerFiles
from checkpoints_tools.sources.huggingface_tokenizer import read_tokenizer

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class HuggingFaceSource:
    """See :class:`checkpoints_tools.sources.contract.Source`.

    Raises
    ------
    NotACheckpointError
        No `config.json`, or no safetensors.
    MissingShardError, TruncatedFileError, ConfigError, UnknownArchitectureError, TensorMismatchError
        As their names say; nothing is read past the headers.
    """

    kind = "huggingface"
    rules = HF_RULES

    def __init__(self, path: Path):
        self.path = path
        self.config = normalise_config(read_json(path / "config.json"), str(path / "config.json"))
        shards, self._shard_of = _shards(path)
        self.tensors: dict[str, TensorInfo] = {}
        for shard in shards:
            with _open(shard) as handle:
                for name in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                    if self._shard_of.setdefault(name, shard) != shard:
                        raise TensorMismatchError(
                            f"{shard} holds {name}, which the index places in {self._shard_of[name].name}. "
                            f"Download the shards and {_INDEX} from one revision."
                        )
                    view = handle.get_slice(name)
                    # Ignored tensors (inv_freq buffers) may be of any type, so types are judged where one is read.
                    dtype = _DTYPES.get(view.get_dtype(), np.dtype(np.void))
                    self.tensors[name] = TensorInfo(tuple(view.get_shape()), dtype)
        absent = [name for name in self._shard_of if name not in self.tensors]
        if absent:
            raise TensorMismatchError(
                f"{path / _INDEX} lists tensors that their shards do not hold: {', '.join(absent)}. "
                "Download the shards and the index from one revision."
            )
        extras = (_INDEX, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        self.files = (path / "config.json", *shards, *(path / name for name in extras if (path / name).is_file()))

    def read(self, name: str) -> np.ndarray:
        """Return tensor `name`; raises UnsupportedTensorError where it is not of a floating type of 16 bits or more."""
        shard = self._shard_of[name]
        with _open(shard) as handle:
            if self.tensors[name].dtype not in _DTYPES.values():
                raise UnsupportedTensorError(
                    f"{shard}: {name} is stored as {handle.get_slice(name).get_dtype()}; {', '.join(_DTYPES)} can be "
                    f"read. "
                    "Convert the unquantized checkpoint."
                )
            return handle.get_tensor(name)

    def tokenizer(self) -> TokenizerFiles:
        """Return `tokenizer.json` as it is and the completed `tokenizer_config.json`."""
        return read_tokenizer(self.path, self.config)


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in `file`.

    Raises
    ------
    NotACheckpointError
        `file` is absent.
    ConfigError
        It is no JSON object.
    """
    if not file.is_file():
        raise NotACheckpointError(
            f"{file.parent} has no {file.name}, so it is not an HF checkpoint directory. Pass the directory that "
            "`save_pretrained` wrote or that was downloaded whole, or a .gguf file."
        )
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON ({error}). Download it again.") from error
    if not isinstance(contents, dict):
        raise ConfigError(f"{file} holds a JSON {type(contents).__name__}, not an object. Download it again.")
    return contents


def _shards(path: Path) -> tuple[list[Path], dict[str, Path]]:
    """Return the weight files and, where there is an index, the file of each tensor."""
    if (path / _INDEX).is_file():
        index = read_json(path / _INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise ConfigError(f"{path / _INDEX} has no weight_map. Download it again.")
        names = sorted(set(index.values()))
        absent = [name for name in names if not (path / name).is_file()]
        if absent:
            raise MissingShardError(
                f"{path} lacks {len(absent)} of the {len(names)} shards that {_INDEX} names: {', '.join(absent)}. "
                "Download them into the same directory."
            )
        return [path / name for name in names], {tensor: path / name for tensor, name in index.items()}
    if (path / _SINGLE).is_file():
        return [path / _SINGLE], {}
    if stray := sorted(file.name for file in path.glob("model-*-of-*.safetensors")):
        raise MissingShardError(f"{path} has {', '.join(stray)} but no {_INDEX}. Download the index beside them.")
    raise NotACheckpointError(
        f"{path} has neither {_SINGLE} nor {_INDEX}. Where it holds pytorch_model.bin, load it with transformers and "
        "`save_pretrained(directory, safe_serialization=True)` first."
    )


def _open(shard: Path):
    try:
        return safe_open(shard, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise TruncatedFileError(
            f"{shard} is truncated or damaged ({error}); it is {shard.stat().st_size} bytes long. Download it again."
        ) from error
