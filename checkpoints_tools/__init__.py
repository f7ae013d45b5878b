"""Convert LLaMA-family checkpoints (HF safetensors, GGUF) to one Orbax directory, and restore it."""

from checkpoints_tools.conversion import convert as convert
from checkpoints_tools.embedded import smollm2_source as smollm2_source
from checkpoints_tools.errors import CheckpointError as CheckpointError
from checkpoints_tools.errors import ChecksumError as ChecksumError
from checkpoints_tools.errors import ConfigError as ConfigError
from checkpoints_tools.errors import EmbeddedModelError as EmbeddedModelError
from checkpoints_tools.errors import LeafMismatchError as LeafMismatchError
from checkpoints_tools.errors import ManifestError as ManifestError
from checkpoints_tools.errors import MissingShardError as MissingShardError
from checkpoints_tools.errors import NotACheckpointError as NotACheckpointError
from checkpoints_tools.errors import OutputExistsError as OutputExistsError
from checkpoints_tools.errors import TensorMismatchError as TensorMismatchError
from checkpoints_tools.errors import TokenizerError as TokenizerError
from checkpoints_tools.errors import TruncatedFileError as TruncatedFileError
from checkpoints_tools.errors import UnknownArchitectureError as UnknownArchitectureError
from checkpoints_tools.errors import UnsupportedTensorError as UnsupportedTensorError
from checkpoints_tools.restoring import Checkpoint as Checkpoint
from checkpoints_tools.restoring import restore as restore
