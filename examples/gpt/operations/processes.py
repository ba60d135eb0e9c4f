"""Multi-process runs, and signals that stop a run."""

import contextlib
import glob
import importlib.util
import os
import signal
import sys
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from examples.gpt.core.config import ConfigError, Processes
from examples.gpt.operations.folders import reraise_as_config_error


def join_processes(config: Processes) -> None:
    """Connect to the run's other processes, if any. Must run before any JAX computation."""
    given = tuple(vars(config).values())
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    has_others = (
        None not in given
        or (chips and importlib.util.find_spec("libtpu"))  # on Cloud TPU
        or int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1
        or "JOB_COMPLETION_INDEX" in os.environ  # on Kubernetes
    )
    if has_others:
        message = "Could not connect to the other processes"
        with reraise_as_config_error(message, RuntimeError, ValueError):
            # If a process dies, JAX ends the other processes after this timeout.
            jax.distributed.initialize(*given, heartbeat_timeout_seconds=20)


def is_first_process() -> bool:
    """Return whether this is process 0, which prints and writes the metrics."""
    return jax.process_index() == 0


@contextlib.contextmanager
def raise_on_all_processes() -> Iterator[None]:
    """Raise on all processes if the body raises on any, so that no process hangs."""
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    if np.any(multihost_utils.process_allgather(np.array(error is not None))):
        raise error or ConfigError("Another process failed. See its error.")


class StopSignal:
    """A handler of SIGTERM and Ctrl-C. The run then completes its step, saves, and stops.

    A second signal ends the process immediately. A signal to any process stops all of them.
    """

    def __init__(self):
        self.number: int | None = None
        self._is_shared = jax.distributed.is_initialized()
        signal.signal(signal.SIGINT, self._handle)
        if not self._is_shared:  # with several processes, JAX handles SIGTERM
            signal.signal(signal.SIGTERM, self._handle)

    def should_stop(self, step: int) -> bool:
        """Return whether to stop after this step. All processes return the same value."""
        if self._is_shared and multihost_utils.reached_preemption_sync_point(step):
            self.number = signal.SIGTERM
        return self.number is not None

    def _handle(self, number: int, _) -> None:
        signal.signal(number, signal.SIG_DFL)
        if self._is_shared:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.number = number
            print(
                "\nThe run will save a checkpoint after this step and stop.",
                file=sys.stderr,
            )
