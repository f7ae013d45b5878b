"""Shared fixtures. Hypothesis runs derandomized, so that a run of the suite is a run anybody can repeat."""

import gc
import os
from pathlib import Path

import jax
import pytest
from hypothesis import HealthCheck, settings

if jax.default_backend() != "gpu":  # before any kernel is imported: Triton interprets them
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile(
    "certjax", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("certjax")

# Most of the suite's time is XLA compiling. Workers and later runs share what was compiled (keyed by program,
# flags and version).
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


# What is imported stays; tracing makes many small objects, and a tenth of its time would go into looking for garbage.
gc.freeze()
gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="module")
def quick_compilation():
    """For modules that test control flow: XLA's optimizer would take most of their time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", autouse=True)
def released_programs():
    """A worker that keeps the programs of all modules runs out of memory maps, and XLA then crashes."""
    yield
    jax.clear_caches()


LONGEST = (
    "test_soundness.py", "test_chain.py", "test_notebook.py", "test_attention.py", "test_generate.py", "test_codecs.py",
    "test_cache.py", "test_engine.py", "test_extremes.py", "test_cli.py", "test_faults.py", "test_generate_codecs.py",
)  # fmt: skip
"""Files that take long go first (with xdist's --no-loadscope-reorder), so that no worker is left alone with one."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    for item in items:
        if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
            item.add_marker(pytest.mark.skip(reason="no GPU"))
