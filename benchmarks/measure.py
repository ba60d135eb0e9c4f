"""Timing of programs that run alternately, and the benchmarks' command line."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import random
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

Row = dict[str, Any]
Rows = list[Row]

RESULTS = Path(__file__).parent / "results"


class Program:
    """A compiled step `fn(carry, *args) -> carry`. Each call donates the current carry."""

    def __init__(self, fn: Callable[..., Any], carry: Any, *args: Any):
        self.carry, self.args = carry, args
        jitted = jax.jit(fn, donate_argnums=0, keep_unused=True)
        self.compiled = jitted.lower(carry, *args).compile()

    def __call__(self) -> Any:
        self.carry = self.compiled(self.carry, *self.args)
        return self.carry

    def bytes_accessed(self) -> float:
        """Return XLA's count of bytes read and written. XLA counts a loop's body once."""
        analysis: Any = self.compiled.cost_analysis()
        return analysis["bytes accessed"]


def time_alternating(
    programs: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, list[float]]:
    """Return the times in seconds of `repeats` runs per program, after one warm-up run.

    The programs alternate in a random order, so changes in the machine's speed and in the
    contents of caches and memory affect all programs equally.
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    shuffled = random.Random(0)
    for _ in range(1 + repeats):
        for name in shuffled.sample(list(programs), len(programs)):
            start = time.perf_counter()
            jax.block_until_ready(programs[name]())
            seconds[name].append(time.perf_counter() - start)
    return {name: runs[1:] for name, runs in seconds.items()}


def quartiles(values: Iterable[float]) -> dict[str, float]:
    """Return the median, the lower quartile and the upper quartile of the values."""
    low, median, high = map(float, np.quantile(list(values), (0.25, 0.5, 0.75)))
    return {"median": median, "low": low, "high": high}


def ratios(runs: list[float], base: list[float]) -> dict[str, float]:
    """Return the median and quartiles, over rounds, of the ratio of two programs' times."""
    return quartiles(a / b for a, b in zip(runs, base, strict=True))


def show(values: Mapping[str, float]) -> str:
    """Format a median with its quartiles as text."""
    return "{median:.2f} ({low:.2f} to {high:.2f})".format_map(values)


def markdown(rows: Rows, columns: Mapping[str, str | Callable[[Row], str]]) -> str:
    """Return a Markdown table of dicts. A column is a key, or a function of a row."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = (str(row[c]) if isinstance(c, str) else c(row) for c in columns.values())
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def run(
    name: str,
    measure: Callable[[Any], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
    *,
    small: Any,
    full: Any = None,
) -> None:
    """Run the command line of a benchmark: measure, print the table, store the results.

    Args:
      name: name of the benchmark and of the file with its results.
      measure: a function from sizes to JSON-serializable results.
      table: a function from the results to Markdown.
      small: sizes for two CPU cores.
      full: sizes for a GPU, used with `--full`. The default is `small`.
    """
    parser = argparse.ArgumentParser(prog=f"benchmarks.{name}")
    parser.add_argument("--full", action="store_true", help="use the sizes for a GPU")
    is_full = parser.parse_args().full
    machine = describe()
    print(json.dumps(machine), flush=True)
    results = json.loads(json.dumps(measure(full or small if is_full else small)))
    print(table(results))
    folder = f"{machine['device']} {machine['cpu_cores']} cores".lower()
    path = RESULTS / re.sub(r"[^a-z0-9.]+", "-", folder) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")
    print(f"\nWrote {path}")


def describe() -> dict[str, Any]:
    """Return the device and the package versions, which are stored with each result."""
    packages = ("jax", "jaxlib", "optax", "flax", "python-somax", "sophia_optax")
    return {
        "device": _device(),
        "device_count": jax.device_count(),
        "cpu_cores": os.cpu_count(),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _device() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    match = re.search(r"model name\s*:\s*(.*)", text)
    name = match[1] if match else platform.processor() or platform.machine()
    return " ".join(re.sub(r"\((R|TM)\)|CPU|Processor|@", " ", name).split())
