import gc
import itertools
import os
import shutil
import tempfile

# Disable XLA's optimizations, because the tests spend most of their time on compilation.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_force_host_platform_device_count=8",
    ]
)

import jax
import pytest

# Collect garbage less often. Otherwise garbage collection takes a tenth of the test time,
# because JAX's tracing creates many long-lived objects.
gc.set_threshold(200_000, 50, 50)


def pytest_configure(config):
    """Create a compilation cache for this pytest worker and its trainer subprocesses.

    Workers do not share a cache, because JAX does not write cache entries atomically.
    """
    folder = tempfile.mkdtemp(prefix="compiled-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    for name, value in {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


_tests_since_clearing = itertools.count(1)


@pytest.fixture(autouse=True)
def _clear_jax_caches():
    """Clear JAX's caches after every fourth test. Otherwise the caches take several GB."""
    yield
    if next(_tests_since_clearing) % 4 == 0:
        jax.clear_caches()


def pytest_terminal_summary(terminalreporter, config):
    if config.option.markexpr == "not slow":
        terminalreporter.write_line(
            'Slow tests are deselected. All tests: pytest -m "slow or not slow"'
        )


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def one_device(monkeypatch):
    """Make `jax.devices` and `jax.device_count` report a single device."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)
