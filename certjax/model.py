"""`load`: a name or a directory in, a model ready to generate out."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

import checkpoints_tools
from certjax.errors import InvalidArgumentError
from certjax.models.llama.config import LlamaConfig
from certjax.tokenizer import Tokenizer

EMBEDDED = {"smollm2": checkpoints_tools.smollm2_source}
"""Models that install from a package registry: name -> finder of the source checkpoint."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A LLaMA-family model: configuration, parameters (a pytree on the device), tokenizer."""

    config: LlamaConfig
    params: Any
    tokenizer: Tokenizer | None
    name: str = "model"

    def __repr__(self) -> str:
        return f"Model({self.name!r}, {self.n_parameters:,} parameters, {self.config})"

    @property
    def n_parameters(self) -> int:
        """Number of weights."""
        return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(self.params))


def cache_directory() -> Path:
    """Where converted models and compiled programs are kept: `$XDG_CACHE_HOME/certjax` or `~/.cache/certjax`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "certjax"


def load(
    name_or_dir: str | os.PathLike = "smollm2",
    *,
    dtype: str | None = None,
    kv_dtype: str | None = None,
    sharding: Any = None,
    progress: bool = True,
) -> Model:
    """Load a converted checkpoint, or convert the embedded model on first use.

    Parameters
    ----------
    name_or_dir
        "smollm2" (SmolLM2-135M-Instruct), or a directory written by `certjax convert`.
    dtype
        Compute dtype of the parameters, default as stored.
    kv_dtype
        Dtype of the cached originals: "float16", "bfloat16" or "float32".
    sharding
        A `jax.sharding.Sharding`, or a pytree of them, to restore the parameters with.
    progress
        Show the progress of a conversion.

    Raises
    ------
    InvalidArgumentError
        If the name is unknown and no such directory exists, or the directory is not a converted checkpoint.
    checkpoints_tools.CheckpointError
        If the checkpoint is damaged or its source is missing.
    """
    directory = _resolve(name_or_dir, progress)
    checkpoint = checkpoints_tools.restore(directory, dtype=dtype, sharding=sharding)
    config = LlamaConfig.from_hf(checkpoint.config)
    stored = str(jax.tree.leaves(checkpoint.params)[0].dtype)
    changes = {"dtype": stored, "kv_dtype": kv_dtype or ("bfloat16" if stored == "bfloat16" else "float16")}
    tokenizer = Tokenizer(directory) if (directory / "tokenizer.json").exists() else None
    return Model(
        config=dataclasses.replace(config, **changes),
        params=checkpoint.params,
        tokenizer=tokenizer,
        name=str(name_or_dir),
    )


def _resolve(name_or_dir: str | os.PathLike, progress: bool) -> Path:
    if str(name_or_dir) in EMBEDDED:
        name = str(name_or_dir)
        target = cache_directory() / "models" / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            checkpoints_tools.convert(EMBEDDED[name](), target, progress=progress)
        return target
    directory = Path(name_or_dir)
    if not directory.is_dir():
        raise InvalidArgumentError(
            f"no model {str(name_or_dir)!r}: it is neither a directory nor one of {', '.join(EMBEDDED)}."
        )
    if not (directory / "manifest.json").exists():
        raise InvalidArgumentError(
            f"{directory} is not a converted checkpoint (no manifest.json); run "
            f"`certjax convert {directory} OUTPUT` and load OUTPUT."
        )
    return directory
