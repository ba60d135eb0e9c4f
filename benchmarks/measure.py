"""Run programs side by side, read what the compiler says of them, show and keep it."""

import argparse
import concurrent.futures
import datetime
import importlib.metadata
import json
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

Row = dict[str, Any]
Rows = list[Row]

RESULTS = Path(__file__).parent / "results"


class Program:
    """A compiled step `fn(carry, *args) -> carry`. It owns its carry, which is donated."""

    def __init__(self, fn: Callable[..., Any], carry: Any, *args: Any):
        self.carry, self.args = carry, args
        jitted = jax.jit(fn, donate_argnums=0, keep_unused=True)
        self.compiled = jitted.lower(carry, *args).compile()

    def __call__(self) -> Any:
        self.carry = self.compiled(self.carry, *self.args)
        return self.carry

    def costs(self) -> dict[str, float]:
        return costs(self.compiled)


def compile_all(makers: Mapping[str, Callable[[], Program]]) -> dict[str, Program]:
    """The programs by name, compiled as many at once as there are cores."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = pool.map(lambda make: make(), makers.values())
        return dict(zip(makers, programs, strict=True))


def in_turn(
    programs: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, list[float]]:
    """Seconds of every run of each program, after one run to warm up.

    They run in turn, so that the machine's moods fall on all of them alike, and in another
    order each round, so that what one leaves behind in caches and memory does too.
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    shuffled = random.Random(0)
    for _ in range(1 + repeats):
        for name in shuffled.sample(list(programs), len(programs)):
            start = time.perf_counter()
            jax.block_until_ready(programs[name]())
            seconds[name].append(time.perf_counter() - start)
    return {name: runs[1:] for name, runs in seconds.items()}


def spread(values: Iterable[float]) -> dict[str, float]:
    """The median, and the quartiles that half of the values lie between."""
    values = list(values)
    if len(values) < 2:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, median, high = statistics.quantiles(values, method="inclusive")
    return {"median": median, "low": low, "high": high}


def ratios(runs: list[float], base: list[float]) -> dict[str, float]:
    """The spread of a program's time over another's, taken round by round."""
    return spread(a / b for a, b in zip(runs, base, strict=True))


def costs(compiled: jax.stages.Compiled) -> dict[str, float]:
    """What the compiler knows of a program.

    - `bytes`: read and written by its operations; a loop's body counts once;
    - `peak_bytes`: of memory, in which donated arguments count once.
    """
    analysis: Any = compiled.cost_analysis()
    memory: Any = compiled.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return {
        "bytes": analysis.get("bytes accessed", 0.0),
        "peak_bytes": memory.temp_size_in_bytes + kept - memory.alias_size_in_bytes,
    }


def show(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['low']:.2f} to {spread['high']:.2f})"


def markdown(rows: Rows, columns: Mapping[str, str | Callable[[Row], str]]) -> str:
    """A table of the rows: for each heading the name of an entry, or what a cell says."""
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
    """The command line of a benchmark: measures, prints the table, keeps the results.

    Args:
      name: of the benchmark and the file of its results.
      measure: takes a configuration and returns results that JSON can hold.
      table: the results in Markdown.
      small: configuration for two CPU cores.
      full: configuration for a GPU, taken by `--full`; `small` if there is no other.
    """
    parser = argparse.ArgumentParser(prog=f"benchmarks.{name}")
    parser.add_argument("--full", action="store_true", help="at the size for a GPU")
    is_full = parser.parse_args().full
    machine = describe()
    print(json.dumps(machine), flush=True)
    results = json.loads(json.dumps(measure(full or small if is_full else small)))
    print(table(results))
    path = folder() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")
    print(f"\nwritten to {path}")


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


def folder() -> Path:
    """Where the results of this machine are."""
    name = f"{_device()} {os.cpu_count()} cores".lower()
    return RESULTS / re.sub(r"[^a-z0-9.]+", "-", name)


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
