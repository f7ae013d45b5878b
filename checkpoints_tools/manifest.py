"""`manifest.json`: what a converted checkpoint holds, written last, read first.

A directory with a readable manifest was converted to the end. Each leaf's shape, dtype and checksum are recorded from
the array that is handed to Orbax, so that a restore can be compared with what was meant.
"""

import hashlib
import importlib.metadata
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_tools.errors import ManifestError

FILE = "manifest.json"
FORMAT_VERSION = 1
_SMALL = 16 * 2**20  # bytes; above this a source file is identified by name and size only
_PACKAGES = ("jax", "orbax-checkpoint", "numpy", "safetensors", "gguf", "tokenizers")


@dataclass(frozen=True)
class LeafRecord:
    """Shape, dtype name and CRC-32 (8 hex digits, over the C-ordered little-endian bytes) of one leaf."""

    shape: tuple[int, ...]
    dtype: str
    crc32: str


def checksum(array: np.ndarray) -> str:
    """Return the CRC-32 of the bytes of `array` in C order, as 8 hex digits."""
    return f"{zlib.crc32(np.ascontiguousarray(array).view(np.uint8).reshape(-1)):08x}"


def record(array: np.ndarray) -> LeafRecord:
    """Return the record of `array`."""
    return LeafRecord(tuple(array.shape), array.dtype.name, checksum(array))


def write_manifest(
    directory: Path, kind: str, files: Iterable[Path], leaves: Mapping[str, LeafRecord], ignored: Mapping[str, str]
) -> None:
    """Write `manifest.json` into `directory`.

    Parameters
    ----------
    kind : str
        "huggingface" or "gguf".
    files : iterable of Path
        The source's files.
    leaves : mapping
        `{path: LeafRecord}`.
    ignored : mapping
        `{tensor name: reason}` of the tensors that were knowingly left out.
    """
    contents = {
        "format_version": FORMAT_VERSION,
        "source": {"kind": kind, "files": [_describe(file) for file in files]},
        "leaves": {path: asdict(leaf) for path, leaf in leaves.items()},
        "ignored": dict(ignored),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    (directory / FILE).write_text(json.dumps(contents, indent=1), encoding="utf-8")


def read_leaves(directory: Path) -> dict[str, LeafRecord]:
    """Return `{path: LeafRecord}` from the manifest in `directory`.

    Raises
    ------
    ManifestError
        The file is absent, is no JSON, lacks a field, or is of another format version.
    """
    file = directory / FILE
    if not file.is_file():
        raise ManifestError(
            f"{directory} has no {FILE}, so it is no finished conversion. Run checkpoints_tools.convert(source, "
            f"{str(directory)!r})."
        )
    again = "The manifest is damaged: convert the source again with overwrite=True."
    try:
        contents: Any = json.loads(file.read_text(encoding="utf-8"))
        version = contents["format_version"]
        if version != FORMAT_VERSION:
            raise ManifestError(
                f"{file} is of format version {version!r}; this version of checkpoints_tools reads {FORMAT_VERSION}. "
                "Convert the source again with overwrite=True."
            )
        return {
            path: LeafRecord(tuple(int(n) for n in leaf["shape"]), str(leaf["dtype"]), str(leaf["crc32"]))
            for path, leaf in contents["leaves"].items()
        }
    except ManifestError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ManifestError(f"{file} cannot be read ({type(error).__name__}: {error}). {again}") from error


def _describe(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    described: dict[str, Any] = {"name": file.name, "bytes": size}
    if size <= _SMALL:
        described["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return described
