"""Helpers that configure small training runs and run `examples.gpt` in subprocesses."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tokenizers

from examples.gpt.core import sharding, step
from examples.gpt.core.config import Config
from examples.gpt.core.optimizer import make_optimizer, make_schedule
from examples.gpt.presets import parse
from examples.gpt.tools.tokenizers import JsonTokenizer

ROOT = Path(__file__).parents[1]
TEXT = "".join(
    f"line {i}: the quick brown fox jumps over the lazy dog\n" for i in range(400)
)
RUN_CODE = """
import runpy, sys

sys.argv[0] = "examples.gpt"
runpy.run_module("examples.gpt", run_name="__main__")
"""
# This code sends a signal to its own process after a given step. It delays later steps, so
# that several processes have time to agree on the last step.
SIGNAL_CODE = """
import os, sys, time
from examples.gpt.operations.processes import StopSignal

signal_step, signal_number = int(sys.argv.pop(1)), int(sys.argv.pop(1))
should_stop = StopSignal.should_stop


def send(self, step):
    if step == signal_step:
        os.kill(os.getpid(), signal_number)
    if step >= signal_step:
        time.sleep(0.3)
    return should_stop(self, step)


StopSignal.should_stop = send
"""
MERGES = (("Ġ", "w"), ("Ġw", "o"), ("a", "b"), ("q", "u"), ("c", "k"))


def tiny_bpe(merges: tuple[tuple[str, str], ...] = MERGES) -> JsonTokenizer:
    """Return a BPE tokenizer with a token for each byte, each merge and the end of text."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *map("".join, merges)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [*merges]))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(["<|endoftext|>"])
    bpe.enable_truncation(5)  # enabled in some Hub files; `JsonTokenizer` must disable it
    return JsonTokenizer(bpe.to_str().encode())


def flags(**values) -> list[str]:
    """Return the command-line flags that set config fields to the given values."""
    args = []
    for name, value in values.items():
        name = name.replace("_", "-")
        if isinstance(value, bool) and name != "nesterov":
            args.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, tuple):
            args += [f"--{name}", *value]
        else:
            args.append(f"--{name}={value}")
    return args


def make_config(**values) -> Config:
    """Return a config with the given field values, parsed from command-line flags."""
    return parse(flags(**values))


def trace_step(mesh: jax.sharding.Mesh, **values) -> tuple[Any, step.TrainState, Any]:
    """Return a train step traced on a mesh, the abstract state and a state initializer."""
    with jax.set_mesh(mesh):
        config = make_config(**values)
        config = config.with_resolved_defaults(1, sharding.num_batch_shards(mesh))
        step.check_mesh(config, mesh)
        tx = make_optimizer(config, make_schedule(config))
        state = step.abstract_state(config, tx, mesh)
        shape = config.training.batch, config.model.context + 1
        batch_sharding = jax.NamedSharding(mesh, jax.P(sharding.BATCH))
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding)
        traced = step.make_train_step(config, tx, mesh).trace(state, tokens)
    return traced, state, lambda: step.init_state(config, tx, mesh)


def run_flags(data: Path, out: Path, **changes) -> list[str]:
    """Return the flags for a training run that takes a few seconds."""
    values = {"data": data, "out": out, "steps": 20, "warmup": 3}
    values |= {"layers": 2, "heads": 4, "width": 32, "context": 16, "batch": 16}
    values |= {"refresh_batch": 8, "groups": 8, "update_interval": 5, "log_every": 1}
    values |= {"validate_every": 10, "validation_batches": 2, "checkpoint_every": 5}
    return flags(**(values | changes))


def start_command(
    args: list[str],
    devices: int = 1,
    signal_after: tuple[int, int] | None = None,
    patch: str = "",
) -> subprocess.Popen:
    """Start `python -m examples.gpt` in a subprocess with simulated devices.

    If `signal_after` is (step, signal), the subprocess sends this signal to itself after
    this step. The code in `patch` runs before the module.
    """
    signal_args = [] if signal_after is None else [*map(str, map(int, signal_after))]
    code = patch + (SIGNAL_CODE if signal_args else "") + RUN_CODE
    xla_flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-c", code, *signal_args, *args],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": f"{xla_flags} --xla_backend_optimization_level=0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_module(
    name: str, *args: str, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run `python -m NAME` and return the completed process, even if it failed."""
    return subprocess.run(
        [sys.executable, "-m", name, *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run_command(args: list[str], **kwargs) -> tuple[int, str]:
    """Run `examples.gpt`, and return its exit code and output."""
    process = start_command(args, **kwargs)
    output = process.communicate(timeout=240)[0]
    return process.returncode, output


def run_processes(
    args: list[str], count: int, signaled: int | None = None, signal_after=None, **kwargs
) -> tuple[list[int], list[str]]:
    """Run `examples.gpt` in several processes. Return their exit codes and outputs.

    `signal_after` applies to process `signaled`, or by default to all processes.
    """
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    args = [*args, "--coordinator", f"localhost:{port}", "--num-processes", str(count)]
    processes = [
        start_command(
            [*args, "--process-id", str(i)],
            signal_after=signal_after if signaled in (None, i) else None,
            **kwargs,
        )
        for i in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


def read_losses(out: Path) -> list[float]:
    """Return a list of a run's training and validation losses, ordered by step."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row[k] for row in rows for k in ("loss", "val_loss") if k in row]
