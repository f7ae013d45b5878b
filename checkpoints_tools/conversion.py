"""Convert a LLaMA-family checkpoint to one Orbax directory: open -> plan -> fill -> write -> rename."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp

from checkpoints_tools import manifest
from checkpoints_tools.errors import CheckpointError, OutputExistsError, TensorMismatchError, UnsupportedTensorError
from checkpoints_tools.plan import Placement, Plan, make_plan
from checkpoints_tools.progress import track
from checkpoints_tools.sources import open_source
from checkpoints_tools.sources.contract import Source
from checkpoints_tools.tree import nest

PARAMS = "params"
CONFIG = "config.json"

_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def convert(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    dtype: str = "float32",
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Convert an HF directory or a GGUF file to a directory that :func:`restore` reads.

    The output holds `config.json`, `tokenizer.json`, `tokenizer_config.json`, `params/` (Orbax) and `manifest.json`.
    It is written beside `output` under a temporary name and renamed at the end: a conversion that is killed leaves no
    `output`. Tensors are read one at a time into the converted tree. Memory peaks at twice the size of that tree,
    since Orbax copies the arrays of the host before it writes them.

    Parameters
    ----------
    source : path
        A directory with `config.json`, safetensors (one file or shards) and `tokenizer.json`; or a GGUF file.
    output : path
        Where to write; its parents are made.
    dtype : str
        "float32", "bfloat16", "float16", or "source": as stored in safetensors, float32 from GGUF.
    overwrite : bool
        Replace `output` where it is an earlier conversion. Anything else that is in the way is left alone.
    progress : bool
        Draw a progress bar.

    Returns
    -------
    Path
        `output`.

    Raises
    ------
    CheckpointError
        A subclass that says what is wrong with `source` (see :mod:`checkpoints_tools.errors`), an OutputExistsError for
        `output`, or an UnsupportedTensorError where a value is too large for float16.
    """
    source, output = Path(source), Path(output)
    if dtype not in (*_DTYPES, "source"):
        raise CheckpointError(f"dtype is {dtype!r}; choose one of {', '.join(_DTYPES)}, source.")
    _check_output(output, overwrite)
    opened = open_source(source)
    plan = make_plan(opened)
    _check_tied_head(opened, plan)
    # Read before the weights: a tokenizer that cannot be written should not cost a long conversion first.
    tokenizer = opened.tokenizer()

    with _published(output) as directory:
        leaves = _fill(opened, plan, dtype, progress)
        config = opened.config | {"torch_dtype": leaves["embed/embedding"].dtype.name}
        _write_json(directory / CONFIG, config)
        (directory / "tokenizer.json").write_text(tokenizer.tokenizer_json, encoding="utf-8")
        _write_json(directory / "tokenizer_config.json", tokenizer.tokenizer_config)
        records = {path: manifest.record(array) for path, array in leaves.items()}
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((directory / PARAMS).absolute(), nest(leaves))
        manifest.write_manifest(directory, opened.kind, opened.files, records, plan.ignored)
    return output


def _fill(source: Source, plan: Plan, dtype: str, progress: bool) -> dict[str, np.ndarray]:
    """Return `{path: array}`: each leaf allocated once, its layers written in place."""
    leaves = {path: np.empty(shape, kind) for path, (shape, kind) in _layout(source, plan, dtype).items()}
    steps = track(plan.placements, len(plan.placements), f"Converting {source.path.name}", progress)
    for placement in steps:
        tensor = placement.transform.apply(source.read(placement.name), source.config)
        leaf = leaves[placement.path]
        slot = leaf if placement.layer is None else leaf[placement.layer]
        with np.errstate(over="ignore"):  # reported below, by name
            slot[...] = tensor
        if slot.dtype == np.float16:
            _check_fits(slot, tensor, placement, source)
    return leaves


def _layout(source: Source, plan: Plan, dtype: str) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    if dtype != "source":
        return {path: (shape, _DTYPES[dtype]) for path, shape in plan.leaves.items()}
    stored: dict[str, set[np.dtype]] = {}
    for placement in plan.placements:
        stored.setdefault(placement.path, set()).add(source.tensors[placement.name].dtype)
    bad = [f"{path} ({', '.join(map(str, kinds))})" for path, kinds in stored.items() if not _is_one_kept_dtype(kinds)]
    if bad:
        raise UnsupportedTensorError(
            f"dtype is 'source', but {source.path} stores some leaves in a type that cannot be kept, or their layers "
            f"in "
            f"several: {'; '.join(bad)}. Choose dtype='float32'."
        )
    return {path: (shape, next(iter(stored[path]))) for path, shape in plan.leaves.items()}


def _is_one_kept_dtype(kinds: set[np.dtype]) -> bool:
    # float64 is not kept: JAX would narrow it on restore.
    return len(kinds) == 1 and kinds <= set(_DTYPES.values())


def _check_fits(slot: np.ndarray, tensor: np.ndarray, placement: Placement, source: Source) -> None:
    if not np.isfinite(slot).all() and np.isfinite(tensor).all():
        raise UnsupportedTensorError(
            f"{source.path}: {placement.name} holds values up to {float(np.abs(tensor).max()):.4g}, beyond float16's "
            f"65504. "
            "Choose dtype='bfloat16' or 'float32'."
        )


def _check_tied_head(source: Source, plan: Plan) -> None:
    """A stored output projection may be left out only where it really is the embedding."""
    tied = [name for name in plan.ignored if name == "lm_head.weight"]
    embedding = next(p.name for p in plan.placements if p.path == "embed/embedding")
    if tied and not np.array_equal(source.read(tied[0]), source.read(embedding)):
        raise TensorMismatchError(
            f"{source.path}: config.json says tie_word_embeddings, but {tied[0]} differs from {embedding}. "
            "Set tie_word_embeddings to false in config.json to keep both."
        )


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.exists():
        return
    if not overwrite:
        raise OutputExistsError(f"output {output} exists. Pass overwrite=True to replace it, or choose another path.")
    if not (output / manifest.FILE).is_file():
        raise OutputExistsError(
            f"output {output} exists and was not written by convert (it has no {manifest.FILE}), so overwrite=True "
            f"does not "
            "delete it. Remove it yourself, or choose another path."
        )


@contextmanager
def _published(output: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `output` that takes its name on success and disappears on failure."""
    output.parent.mkdir(parents=True, exist_ok=True)
    tag = uuid.uuid4().hex[:8]
    directory = output.parent / f".{output.name}.partial-{tag}"
    directory.mkdir()
    try:
        yield directory
        if output.exists():
            # Two renames, since a directory cannot be replaced in one: a kill between them loses no data.
            replaced = output.parent / f".{output.name}.replaced-{tag}"
            output.rename(replaced)
            try:
                directory.rename(output)
            except BaseException:
                replaced.rename(output)
                raise
            shutil.rmtree(replaced)
        else:
            directory.rename(output)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _write_json(file: Path, contents: dict) -> None:
    file.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
