"""Readers, one file a checkpoint format, behind one contract (`contract.Source`).

The converter never asks which format it reads: a new format is one reader, one name table, and one line of
`open_source`.
"""

from pathlib import Path

from checkpoints_tools.errors import NotACheckpointError
from checkpoints_tools.sources.contract import Source
from checkpoints_tools.sources.gguf_file import GGUFSource
from checkpoints_tools.sources.huggingface import HuggingFaceSource


def open_source(path: Path) -> Source:
    """Open the checkpoint at `path`: a GGUF file, or a directory with `config.json` and safetensors.

    Raises
    ------
    NotACheckpointError
        `path` does not exist or is neither.
    CheckpointError
        Whatever the reader found wrong; see :mod:`checkpoints_tools.errors`.
    """
    if not path.exists():
        raise NotACheckpointError(f"source {path} does not exist. Pass an HF directory or a .gguf file.")
    if path.is_dir():
        return HuggingFaceSource(path)
    if GGUFSource.recognises(path):
        return GGUFSource(path)
    raise NotACheckpointError(
        f"source {path} is not a GGUF file (it does not begin with the bytes 'GGUF'). For safetensors, pass the "
        f"directory "
        "that holds config.json and model.safetensors."
    )
