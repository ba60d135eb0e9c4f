"""Run programs side by side, and read what the compiler says of them."""

import argparse
import concurrent.futures
import json
import os
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import tyro

from benchmarks import machine

Rows = list[dict[str, Any]]


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


def show(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['low']:.2f} to {spread['high']:.2f})"


def costs(compiled: jax.stages.Compiled) -> dict[str, float]:
    """What the compiler knows of a program: a loop's body counts once in the first two.

    - `flops`, `bytes`: operations, and bytes that they read and write;
    - `kernels`: instructions that run one after another, about as many launches on a GPU;
      a loop or a `cond` counts as one;
    - `temporary_bytes`: memory that is held during the program alone;
    - `peak_bytes`: that and the arguments and results, where donated ones count once.
    """
    analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
    assert analysis is not None
    assert memory is not None
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return {
        "flops": analysis.get("flops", 0.0),
        "bytes": analysis.get("bytes accessed", 0.0),
        "kernels": _kernels(compiled.as_text()),
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.temp_size_in_bytes + kept - memory.alias_size_in_bytes,
    }


def _kernels(text: str | None) -> int:
    _, _, entry = (text or "").partition("\nENTRY ")
    operations = re.findall(r"^ .* = .*? ([\w\-]+)\(", entry, re.MULTILINE)
    free = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
    return sum(operation not in free for operation in operations)


def markdown(rows: Rows, columns: Mapping[str, Callable[[dict[str, Any]], str]]) -> str:
    """A table of the rows, a column for each heading."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        lines.append(f"| {' | '.join(cell(row) for cell in columns.values())} |")
    return "\n".join(lines)


def run(
    name: str,
    measure: Callable[[Any], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
    *,
    small: Any,
    full: Any,
) -> None:
    """The command line of a benchmark: measures, prints the table, writes the results.

    Args:
      name: of the benchmark and the file of its results.
      measure: takes a configuration and returns results that JSON can hold.
      table: the results in Markdown.
      small: configuration for two CPU cores.
      full: configuration for a GPU, taken by `--full`.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--full", action="store_true")
    size, rest = parser.parse_known_args(sys.argv[1:])
    default = full if size.full else small
    config = tyro.cli(
        type(default),
        prog=f"benchmarks.{name}",
        description="For two CPU cores by default; --full is a size for a GPU, from which "
        "the other options then start. Only these two sizes are written to results.",
        args=rest,
        default=default,
    )
    if config != default:  # a trial: it must not take the place of what is kept
        machine.write_elsewhere()
    print(json.dumps(machine.describe()), flush=True)
    results = measure(config)
    print(table(results))
    machine.write(name, results)
