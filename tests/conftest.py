"""Shared fixtures. Hypothesis runs derandomized, so that a run of the suite is a run anybody can repeat."""

import jax
import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "certjax", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("certjax")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
            item.add_marker(pytest.mark.skip(reason="no GPU"))
