import os

# Compilation is most of the tests' time. No test here depends on what XLA makes faster.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_force_host_platform_device_count=8",
    ]
)

import jax
import pytest


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
