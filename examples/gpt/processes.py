"""Several processes as one run, and the signal to leave it."""

import contextlib
import glob
import importlib.util
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from examples.gpt.config import ConfigError, Processes

SIGNALS = (signal.SIGTERM, signal.SIGINT)
LOST = os.EX_TEMPFAIL  # 75: start again, it was another process that was lost


class Interrupted(Exception):
    """A signal came, and the run has saved where it is."""

    def __init__(self, saved: str, signal: int):
        super().__init__(saved)
        self.signal = signal


def join(config: Processes) -> None:
    """Joins the other processes, if there are any; before anything is computed."""
    given: Any = (config.coordinator, config.num_processes, config.process_id)
    if None not in given:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    elif _on_cloud_tpu() or _in_slurm_step() or _in_kubernetes_job():
        given = ()
    else:
        return
    try:
        # Where collectives do not fail themselves, a lost process is known by its silence.
        jax.distributed.initialize(*given, heartbeat_timeout_seconds=20)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"The processes did not find each other: {error}\nOn Kubernetes they need "
            'pip install "jax[k8s]". Anywhere, `coordinator`, `num_processes` and '
            "`process_id` tell them."
        ) from error


def from_first(number: int) -> int:
    """The first process's number, on all."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def anywhere(flag: bool) -> bool:
    """Whether the flag is set on any process."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A part of the run that all processes leave, or none: else the others would wait."""
    error = None
    try:
        yield
    except ConfigError as raised:
        error = raised
    if anywhere(error is not None):
        raise error or ConfigError("Another process can't go on, and says why.")


_OF_A_LOST_PROCESS = re.compile(
    "unavailable|heartbeat|preempt|connection (closed|reset)|socket closed", re.IGNORECASE
)


@contextlib.contextmanager
def ends_if_one_is_lost() -> Iterator[None]:
    """A part of the run that ends at once, with one line, where another process was lost.

    Whatever else Python and JAX do at their end would wait for that process. A checkpoint
    that is being written is lost with it: the run goes on from the one before.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        if jax.process_count() == 1 or not _OF_A_LOST_PROCESS.search(reason):
            raise
        print(
            f"error: Another process of the run was lost ({reason}). Start all of them "
            "again with the same command: they go on from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(LOST)


def check_shared(path: Path, seconds: float = 30.0) -> None:
    """Raises ConfigError if this process does not see what the first has written."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"`out` must be a folder that all processes see, and {path}, which the "
                "first has written, is not there."
            )
        time.sleep(0.1)


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


class Signal:
    """Takes note of SIGTERM and Ctrl-C: the run ends after a step, and loses nothing.

    A second one ends it at once. Where there are several processes, one to any of them is
    for all.
    """

    def __enter__(self) -> "Signal":
        self._came: int | None = None
        signals = () if jax.distributed.is_initialized() else SIGNALS
        self._before = {number: signal.signal(number, self._note) for number in signals}
        if not signals:  # JAX passes a SIGTERM on to all processes
            self._before = {signal.SIGINT: signal.signal(signal.SIGINT, self._terminate)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def came(self, step: int) -> int | None:
        """The signal to end after this step, if there is one: the same in all processes."""
        if jax.distributed.is_initialized():
            came = multihost_utils.reached_preemption_sync_point(step)
            return signal.SIGTERM if came else None
        return self._came

    def _terminate(self, *_) -> None:
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])
        os.kill(os.getpid(), signal.SIGTERM)

    def _note(self, number: int, _) -> None:
        self._came = number
        print("\nThe run ends after this step, and is saved.", file=sys.stderr)
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _on_cloud_tpu() -> bool:
    has_chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*")
    return bool(has_chips) and importlib.util.find_spec("libtpu") is not None


def _in_slurm_step() -> bool:
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def _in_kubernetes_job() -> bool:
    return {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys()
