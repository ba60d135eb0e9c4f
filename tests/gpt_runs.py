"""Runs of `python -m examples.gpt` for the tests: small, in processes of their own."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import tokenizers

from examples.gpt.tools.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
TEXT = "".join(
    f"line {i}: the quick brown fox jumps over the lazy dog\n" for i in range(400)
)

# Starts the command, and sends itself a signal when a step has been handed on. The steps
# after take a while, in which processes agree where to end.
SIGNALLED = """
import os, runpy, signal, sys, time
from examples.gpt.operations.processes import Signal

step_to_die_at, signal_to_send = int(sys.argv.pop(1)), int(sys.argv.pop(1))
came = Signal.came


def die(self, step):
    if step == step_to_die_at:
        os.kill(os.getpid(), signal_to_send)
    if step >= step_to_die_at:
        time.sleep(0.3)
    return came(self, step)


Signal.came = die
sys.argv[0] = "examples.gpt"
runpy.run_module("examples.gpt", run_name="__main__")
"""


STARTED = """
import runpy, sys

sys.argv[0] = "examples.gpt"
runpy.run_module("examples.gpt", run_name="__main__")
"""


MERGES = (("Ġ", "w"), ("Ġw", "o"), ("a", "b"), ("q", "u"), ("c", "k"))


def tiny_bpe(merges: tuple[tuple[str, str], ...] = MERGES) -> Tokenizer:
    """Return a tokenizer with a token for each byte and each merge."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *map("".join, merges)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [*merges]))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(["<|endoftext|>"])
    return Tokenizer("tiny", bpe.to_str().encode())


def arguments(data: Path, out: Path, **changes) -> list[str]:
    """Those of a run of seconds."""
    settings = {
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
    flags = [(f"--{k.replace('_', '-')}", str(v)) for k, v in (settings | changes).items()]
    return [text for flag in flags for text in flag]


def start(
    args: list[str],
    devices: int = 1,
    signalled: tuple[int, int] | None = None,
    patch: str | None = None,
) -> subprocess.Popen:
    """The command with these arguments, on so many simulated devices.

    With `signalled`, a step and a signal, it sends itself the signal after the step; with
    `patch`, it runs this code first.
    """
    command = ["-m", "examples.gpt"]
    if signalled is not None:
        command = ["-c", SIGNALLED, *map(str, map(int, signalled))]
    if patch is not None:
        command = ["-c", patch + STARTED]
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, *command, *args],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": f"{flags} --xla_backend_optimization_level=0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(args: list[str], **kwargs) -> tuple[int, str]:
    """The exit code of the command, and what it printed."""
    process = start(args, **kwargs)
    output = process.communicate(timeout=240)[0]
    return process.returncode, output


def run_together(
    args: list[str],
    processes: int,
    devices: int,
    which: int | None = None,
    signalled: tuple[int, int] | None = None,
    patch: str | None = None,
):
    """The command in several processes: their exit codes, and what they printed.

    All of them are signalled, or the one that `which` numbers.
    """
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    joined = ["--coordinator", f"localhost:{port}", "--num-processes", str(processes)]
    running = [
        start(
            [*args, *joined, "--process-id", str(i)],
            devices,
            signalled if which in (None, i) else None,
            patch,
        )
        for i in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    return [process.returncode for process in running], outputs


def rows(out: Path) -> list[dict]:
    """What a run wrote of each step."""
    text = (out / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def losses(out: Path) -> list[float]:
    """The loss of each step, and of each validation, as written."""
    found = rows(out)
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    return [row[k] for row in found for k in ("loss", "val_loss") if k in row]
