"""Several processes as one run, and signals to stop it."""

import contextlib
import glob
import importlib.util
import os
import re
import signal
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from examples.gpt.core.config import ConfigError, Processes
from examples.gpt.operations.folders import reraise_as_config_error

LOST = os.EX_TEMPFAIL  # 75: start again, another process was lost
_LOST_PROCESS = "unavailable|heartbeat|preempt|connection (closed|reset)|socket closed"


def join_processes(config: Processes) -> None:
    """Connect to the other processes, if there are any, before any computation."""
    given = tuple(vars(config).values())
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/*")
    has_others = (
        None not in given
        or (chips and importlib.util.find_spec("libtpu"))  # on Cloud TPU
        or int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1
        or {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys()
    )
    if has_others:
        message = "The processes did not find each other"
        with reraise_as_config_error(message, RuntimeError, ValueError):
            # Where collectives do not fail, only the heartbeat tells that one was lost.
            jax.distributed.initialize(*given, heartbeat_timeout_seconds=20)


def is_first_process() -> bool:
    """Return whether this process writes and prints."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Return whether the flag is set on any process."""
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def check_same_flags(values: dict[str, Any]) -> None:
    """Raise ConfigError on all processes if their values differ."""
    local = np.uint32(zlib.crc32(repr(sorted(values.items())).encode()))
    if not np.all(multihost_utils.process_allgather(local) == local):
        raise ConfigError("All processes need the same flags, except `process_id`.")


@contextlib.contextmanager
def raise_on_all_processes() -> Iterator[None]:
    """Raise ConfigError on all processes if it is raised on one. The others would wait."""
    error = None
    try:
        yield
    except ConfigError as raised:
        error = raised
    if any_process(error is not None):
        raise error or ConfigError("Another process failed: see its error.")


@contextlib.contextmanager
def exit_if_a_process_is_lost() -> Iterator[None]:
    """Exit with a code for launchers if another process is lost. JAX would wait for it."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        if jax.process_count() == 1 or not re.search(_LOST_PROCESS, reason, re.IGNORECASE):
            raise
        message = f"error: Another process was lost ({reason}). Start all processes again."
        print(message, file=sys.stderr, flush=True)
        os._exit(LOST)


class StopSignal:
    """SIGTERM and Ctrl-C stop the run after a step, with a checkpoint.

    A second signal ends it at once. With several processes, a signal to one stops all.
    """

    def __enter__(self) -> "StopSignal":
        self.number: int | None = None
        self._is_shared = jax.distributed.is_initialized()
        # With several processes JAX handles SIGTERM, and forwards it to all.
        handled = (signal.SIGINT,) if self._is_shared else (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def came(self, step: int) -> bool:
        """Return whether to stop after this step. It is the same on all processes."""
        if self._is_shared and multihost_utils.reached_preemption_sync_point(step):
            self.number = signal.SIGTERM
        return self.number is not None

    def _handle(self, number: int, _) -> None:
        self.__exit__()
        if self._is_shared:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.number = number
            print("\nThe run stops after this step and is saved.", file=sys.stderr)
