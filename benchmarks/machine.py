"""What a measurement was made on, and where its results go."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import tempfile
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"


def describe() -> dict[str, Any]:
    """The device and the versions, as they are kept with every result."""
    packages = ("jax", "jaxlib", "optax", "flax", "python-somax", "sophia_optax")
    return {
        "device": _device(),
        "device_count": jax.device_count(),
        "cpu_cores": os.cpu_count(),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def write_elsewhere() -> None:
    """Sends what is written from now on to a new folder, outside of the project."""
    global RESULTS
    RESULTS = Path(tempfile.mkdtemp())


def folder() -> Path:
    """Where the results of this machine are."""
    name = f"{_device()} {os.cpu_count()} cores".lower()
    return RESULTS / re.sub(r"[^a-z0-9.]+", "-", name)


def write(name: str, results: Any) -> None:
    """Writes results with the machine's description to benchmarks/results/."""
    path = folder() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    written = {"machine": describe(), "results": results}
    path.write_text(json.dumps(written, indent=2) + "\n")
    print(f"\nwritten to {path}")


def _device() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"model name\s*:\s*(.*)", cpuinfo)
    name = match[1] if match else platform.machine()
    return " ".join(re.sub(r"\((R|TM)\)|CPU|Processor|@", " ", name).split())
