import pytest

from checkpoints_tools import EmbeddedModelError, convert, smollm2_source
from tests.checkpoints_tools.builders import hf_weights, tiny_config, write_hf


@pytest.fixture
def config():
    return tiny_config()


@pytest.fixture
def weights(config):
    return hf_weights(config)


@pytest.fixture
def hf_directory(tmp_path, config, weights):
    return write_hf(tmp_path / "hf", config, weights)


@pytest.fixture
def converted(tmp_path, hf_directory):
    """A converted tiny checkpoint."""
    return convert(hf_directory, tmp_path / "out", progress=False)


@pytest.fixture(scope="session")
def smollm2_gguf():
    try:
        return smollm2_source()
    except EmbeddedModelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf, tmp_path_factory):
    """SmolLM2 converted once a session, as float32."""
    return convert(smollm2_gguf, tmp_path_factory.mktemp("smollm2") / "checkpoint", progress=False)
