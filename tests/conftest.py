import gc
import itertools
import os
import shutil
import tempfile

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

# Tracing makes many objects that live long: looking through them is a tenth of the time.
gc.set_threshold(200_000, 50, 50)


def pytest_configure(config):
    """What a worker compiled is found again by it, and by the trainers its tests start.

    Workers share nothing: JAX writes an entry in place, and another would read half of it.
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
    """Free the compiled programs now and then: a worker would grow to several GB."""
    yield
    if next(_tests_since_clearing) % 4 == 0:
        jax.clear_caches()


_left_out = {0}  # slow tests that were not selected, as each process counted them


def pytest_deselected(items):
    _left_out.add(sum(item.get_closest_marker("slow") is not None for item in items))


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["slow"] = max(_left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    _left_out.add(getattr(node, "workeroutput", {}).get("slow", 0))


def pytest_terminal_summary(terminalreporter):
    if count := max(_left_out):
        terminalreporter.write_line(
            f'{count} slow tests were left out; all of them: pytest -m "slow or not slow"'
        )


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def one_device(monkeypatch):
    """JAX has one device, as on most machines that run these tests."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)
