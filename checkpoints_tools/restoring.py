"""Restore a converted checkpoint: compare manifest, configuration and Orbax metadata, load, cast, verify."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from checkpoints_tools.config import normalise_config
from checkpoints_tools.conversion import CONFIG, PARAMS
from checkpoints_tools.errors import CheckpointError, ChecksumError, ConfigError, LeafMismatchError, NotACheckpointError
from checkpoints_tools.manifest import LeafRecord, checksum, read_leaves
from checkpoints_tools.tree import expected_leaves, flatten, nest

_AGAIN = "Convert the source again with overwrite=True."


@dataclass(frozen=True)
class Checkpoint:
    """A restored checkpoint.

    Attributes
    ----------
    config : dict
        HF `LlamaConfig`-style.
    params : dict
        Nested dict of `jax.Array`; layers are stacked on a leading axis, kernels are `[in, out]`.
    directory : Path
        Where it came from; `tokenizer.json` and `tokenizer_config.json` lie there.
    """

    config: dict[str, Any]
    params: dict[str, Any]
    directory: Path


def restore(
    directory: str | os.PathLike, *, dtype: Any = None, sharding: Any = None, verify: bool = False
) -> Checkpoint:
    """Restore the checkpoint that :func:`convert` wrote to `directory`.

    Parameters
    ----------
    directory : path
    dtype : dtype-like, optional
        Cast every leaf to this floating type; as stored where None.
    sharding : jax.sharding.Sharding or pytree of them, optional
        Where the leaves go. A pytree may be a prefix of the parameters tree. JAX's default device where None.
    verify : bool
        Compare the checksum of every leaf with the manifest. Leaves are then loaded as stored and cast afterwards, and
        must be addressable from this process.

    Returns
    -------
    Checkpoint

    Raises
    ------
    NotACheckpointError
        `directory` does not exist.
    ManifestError
        The manifest is absent or damaged.
    ConfigError
        `config.json` is absent or damaged.
    LeafMismatchError
        Configuration, manifest and stored arrays disagree on a leaf, or the arrays cannot be read.
    ChecksumError
        `verify` found other bytes than were written.
    CheckpointError
        `dtype` is no floating type, or `sharding` does not fit the tree.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise NotACheckpointError(
            f"directory {directory} does not exist. Pass the output of checkpoints_tools.convert."
        )
    dtype = _floating(dtype)
    records = read_leaves(directory)
    config = _read_config(directory / CONFIG)
    _check_leaves(
        f"{directory}: {CONFIG} and the manifest disagree",
        {path: (shape, None) for path, shape in expected_leaves(config).items()},
        {path: (leaf.shape, None) for path, leaf in records.items()},
    )

    # Orbax casts while it reads, so that the stored type never takes device memory; a checksum needs the stored bytes.
    load_dtype = None if verify else dtype
    plain = {path: jax.ShapeDtypeStruct(leaf.shape, load_dtype or leaf.dtype) for path, leaf in records.items()}
    target = _place(sharding, plain)
    leaves = flatten(_load(directory, records, nest(target)))
    if verify:
        _verify(directory, records, leaves)
        if dtype is not None:
            leaves = {path: jax.device_put(leaf.astype(dtype), target[path].sharding) for path, leaf in leaves.items()}
    return Checkpoint(config, nest(leaves), directory)


def _floating(dtype: Any) -> np.dtype | None:
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError as error:
        raise CheckpointError(
            f"dtype is {dtype!r}, which is no dtype. Pass 'float32', 'bfloat16' or 'float16'."
        ) from error
    if not jnp.issubdtype(found, jnp.floating):
        raise CheckpointError(
            f"dtype is {found.name}; parameters are floating point. Pass 'float32', 'bfloat16' or 'float16'."
        )
    return found


def _read_config(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        return raw | normalise_config(raw, str(file))
    except CheckpointError:
        raise
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}). {_AGAIN}") from error


def _place(sharding: Any, target: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
    """Return `target` with the sharding of every leaf, from one sharding or a prefix tree of them."""
    if sharding is None:
        sharding = jnp.zeros(()).sharding  # wherever JAX, under its current settings, puts a new array
    try:
        spread = flatten(jax.tree.broadcast(sharding, nest(target), is_leaf=_is_sharding))
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"sharding does not fit the parameters tree ({error}). Pass one jax.sharding.Sharding, or a tree of them "
            "with the keys of params or of its upper levels."
        ) from error
    placed = {}
    for path, leaf in target.items():
        if not _is_sharding(spread[path]):
            raise CheckpointError(f"sharding holds {spread[path]!r} at {path}. Pass a jax.sharding.Sharding there.")
        try:
            placed[path] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=spread[path])
            spread[path].shard_shape(leaf.shape)  # the struct checks the rank only
        except ValueError as error:
            raise CheckpointError(
                f"sharding at {path} does not fit its shape {list(leaf.shape)} ({error}). Shard axes that divide."
            ) from error
    return placed


def _is_sharding(node: Any) -> bool:
    return isinstance(node, jax.sharding.Sharding)


def _load(directory: Path, records: Mapping[str, LeafRecord], target: dict[str, Any]) -> dict[str, Any]:
    path = (directory / PARAMS).absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            stored = checkpointer.metadata(path).item_metadata.tree
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged directory
            raise LeafMismatchError(f"{path} cannot be read ({type(error).__name__}: {error}). {_AGAIN}") from error
        _check_leaves(
            f"{path}: the manifest and the stored arrays disagree",
            {name: (leaf.shape, leaf.dtype) for name, leaf in records.items()},
            {name: (tuple(leaf.shape), jnp.dtype(leaf.dtype).name) for name, leaf in flatten(stored).items()},
        )
        try:
            return jax.block_until_ready(checkpointer.restore(path, target))
        except jax.errors.JaxRuntimeError:  # the device's own trouble, such as too little memory: not the checkpoint's
            raise
        except Exception as error:
            raise LeafMismatchError(
                f"{path} cannot be loaded, its arrays are damaged ({type(error).__name__}: {error}). {_AGAIN}"
            ) from error


def _check_leaves(title: str, wanted: Mapping[str, tuple], found: Mapping[str, tuple]) -> None:
    lines = [f"  missing: {path}" for path in wanted if path not in found]
    lines += [f"  unexpected: {path}" for path in found if path not in wanted]
    for path in wanted.keys() & found.keys():
        if wanted[path] != found[path]:
            lines.append(f"  {path}: expected {_show(wanted[path])}, found {_show(found[path])}")
    if lines:
        raise LeafMismatchError("\n".join([title, *sorted(lines), _AGAIN]))


def _show(shape_and_dtype: tuple) -> str:
    shape, dtype = shape_and_dtype
    return f"{list(shape)} {dtype}" if dtype else str(list(shape))


def _verify(directory: Path, records: Mapping[str, LeafRecord], leaves: Mapping[str, jax.Array]) -> None:
    damaged = [path for path, leaf in leaves.items() if checksum(np.asarray(leaf)) != records[path].crc32]
    if damaged:
        raise ChecksumError(
            f"{directory}: the checksum in the manifest is not that of the stored bytes for {', '.join(damaged)}. "
            f"{_AGAIN}"
        )
