"""Every way a checkpoint can be unusable, each with a class of its own.

All derive from :class:`CheckpointError`, so that one ``except`` covers the package. Messages name the file or argument
at fault and end with the remedy.
"""


class CheckpointError(ValueError):
    """A checkpoint, or a request about one, that cannot be honoured."""


class NotACheckpointError(CheckpointError):
    """The path is missing, or is neither an HF directory, nor a GGUF file, nor a converted checkpoint."""


class MissingShardError(CheckpointError):
    """The index of a sharded checkpoint names files that are not there."""


class TruncatedFileError(CheckpointError):
    """A file ends before, or is damaged within, the data its header announces."""


class UnknownArchitectureError(CheckpointError):
    """The model is not a plain LLaMA decoder."""


class ConfigError(CheckpointError):
    """The configuration lacks a key, or holds a value that contradicts another."""


class TensorMismatchError(CheckpointError):
    """Tensors are missing, unexpected, or of another shape than the configuration implies."""


class UnsupportedTensorError(CheckpointError):
    """A tensor is stored in a type that cannot be read, or does not fit the type asked for."""


class TokenizerError(CheckpointError):
    """The tokenizer is absent, or cannot be expressed as a `tokenizer.json`."""


class OutputExistsError(CheckpointError):
    """The output path is taken."""


class ManifestError(CheckpointError):
    """`manifest.json` is absent, unreadable, or of another format version."""


class LeafMismatchError(CheckpointError):
    """The stored parameters are not the ones that the manifest or the configuration lists."""


class ChecksumError(CheckpointError):
    """The bytes of a leaf are not the bytes that were written."""


class EmbeddedModelError(CheckpointError):
    """The package that carries the example model is not installed."""
