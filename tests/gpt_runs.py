"""Configs of small runs for the tests, and `python -m examples.gpt` in subprocesses."""

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
RUN = """
import runpy, sys

sys.argv[0] = "examples.gpt"
runpy.run_module("examples.gpt", run_name="__main__")
"""
# Sends itself a signal after a step. The next steps take a while, in which the processes
# agree on the last one.
SIGNAL = """
import os, sys, time
from examples.gpt.operations.processes import StopSignal

signalled_step, signal_number = int(sys.argv.pop(1)), int(sys.argv.pop(1))
should_stop = StopSignal.should_stop


def send(self, step):
    if step == signalled_step:
        os.kill(os.getpid(), signal_number)
    if step >= signalled_step:
        time.sleep(0.3)
    return should_stop(self, step)


StopSignal.should_stop = send
"""
MERGES = (("Ġ", "w"), ("Ġw", "o"), ("a", "b"), ("q", "u"), ("c", "k"))


def tiny_bpe(merges: tuple[tuple[str, str], ...] = MERGES) -> JsonTokenizer:
    """Return a tokenizer with a token for each byte and each merge."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *map("".join, merges)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [*merges]))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(["<|endoftext|>"])
    bpe.enable_truncation(5)  # as some files of the hub have; a corpus is not truncated
    return JsonTokenizer(bpe.to_str().encode())


def flags(**values) -> list[str]:
    """Return the command line with these values, by the names of the config's fields."""
    arguments = []
    for name, value in values.items():
        name = name.replace("_", "-")
        if isinstance(value, bool) and name != "nesterov":
            arguments.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, tuple):
            arguments += [f"--{name}", *value]
        else:
            arguments.append(f"--{name}={value}")
    return arguments


def make_config(**values) -> Config:
    """Return the config of a command line with these values."""
    return parse(flags(**values))


def trace_step(mesh: jax.sharding.Mesh, **values) -> tuple[Any, step.TrainState, Any]:
    """Return the traced training step of a config, an abstract state and `init_state`."""
    with jax.set_mesh(mesh):
        config = make_config(**values)
        config = config.with_resolved_defaults(1, sharding.num_batch_shards(mesh))
        step.check_mesh(config, mesh)
        tx = make_optimizer(config, make_schedule(config))
        state = step.abstract_state(config, tx, mesh)
        shape = config.training.batch, config.model.context + 1
        where = jax.NamedSharding(mesh, jax.P(sharding.BATCH))
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where)
        traced = step.make_train_step(config, tx, mesh).trace(state, tokens)
    return traced, state, lambda: step.init_state(config, tx, mesh)


def arguments(data: Path, out: Path, **changes) -> list[str]:
    """Return the command line of a run that takes seconds."""
    values = {
        "data": data,
        "out": out,
        "steps": 20,
        "warmup": 3,
        "layers": 2,
        "heads": 4,
        "width": 32,
        "context": 16,
        "batch": 16,
        "refresh_batch": 8,
        "groups": 8,
        "update_interval": 5,
        "validate_every": 10,
        "validation_batches": 2,
        "checkpoint_every": 5,
        "log_every": 1,
    }
    return flags(**(values | changes))


def start(
    args: list[str],
    devices: int = 1,
    signalled: tuple[int, int] | None = None,
    patch: str = "",
) -> subprocess.Popen:
    """Start the command on simulated devices.

    With `signalled`, a step and a signal, the command sends itself the signal after the
    step. `patch` is code that runs first.
    """
    sent = [] if signalled is None else [*map(str, map(int, signalled))]
    code = patch + (SIGNAL if sent else "") + RUN
    xla_flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-c", code, *sent, *args],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": f"{xla_flags} --xla_backend_optimization_level=0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_module(
    name: str, *args: str, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run `python -m NAME`, without an exception if it fails."""
    return subprocess.run(
        [sys.executable, "-m", name, *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run(args: list[str], **kwargs) -> tuple[int, str]:
    """Run the command, and return its exit code and output."""
    process = start(args, **kwargs)
    output = process.communicate(timeout=240)[0]
    return process.returncode, output


def run_processes(
    args: list[str], count: int, which: int | None = None, signalled=None, **kwargs
) -> tuple[list[int], list[str]]:
    """Run the command in several processes, and return their exit codes and outputs.

    All of them are signalled, or only process `which`.
    """
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    joined = ["--coordinator", f"localhost:{port}", "--num-processes", str(count)]
    running = [
        start(
            [*args, *joined, "--process-id", str(i)],
            signalled=signalled if which in (None, i) else None,
            **kwargs,
        )
        for i in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    return [process.returncode for process in running], outputs


def losses(out: Path) -> list[float]:
    """Return the losses of all steps and validations of a run."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row[k] for row in rows for k in ("loss", "val_loss") if k in row]
