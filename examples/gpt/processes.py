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

LOST = os.EX_TEMPFAIL  # 75: start again, it was another process that was lost


def join(config: Processes) -> None:
    """Joins the other processes, if there are any, before anything is computed."""
    given: Any = (config.coordinator, config.num_processes, config.process_id)
    if None not in given:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    elif not _are_started_together():
        return
    try:
        # Where collectives do not fail themselves, a lost process is known by its silence.
        jax.distributed.initialize(*given, heartbeat_timeout_seconds=20)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"The processes did not find each other: {error}\nGive `coordinator`, "
            "`num_processes` and `process_id` by hand."
        ) from error


def _are_started_together() -> bool:
    """On Cloud TPU, in a step of Slurm with several tasks, or in a Kubernetes job."""
    has_chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*")
    return (
        (bool(has_chips) and importlib.util.find_spec("libtpu") is not None)
        or int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1
        or {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys()
    )


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def anywhere(flag: bool) -> bool:
    """Whether the flag is set on any process."""
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


@contextlib.contextmanager
def ends_if_one_is_lost() -> Iterator[None]:
    """A part of the run that ends at once, with one line, where another process was lost.

    Whatever else Python and JAX do at their end would wait for that process.
    """
    lost = "unavailable|heartbeat|preempt|connection (closed|reset)|socket closed"
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        if jax.process_count() == 1 or not re.search(lost, reason, re.IGNORECASE):
            raise
        print(
            f"error: Another process of the run was lost ({reason}). Start all of them "
            "again with the same command: they go on from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(LOST)


def check_shared(path: Path) -> None:
    """Raises ConfigError if this process does not see what the first has written."""
    for _ in range(300):  # file systems of clusters may take a while
        if path.exists():
            return
        time.sleep(0.1)
    raise ConfigError(
        f"`out` must be a folder that all processes see, and {path}, which the first has "
        "written, is not there."
    )


class Signal:
    """SIGTERM and Ctrl-C end the run after a step, and it loses nothing.

    A second one ends it at once. Of several processes, one to any of them is for all.
    """

    def __enter__(self) -> "Signal":
        self._came: int | None = None
        self._is_shared = jax.distributed.is_initialized()
        # With several processes JAX takes SIGTERM, and passes it on to all.
        noted = (signal.SIGINT,) if self._is_shared else (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._note) for number in noted}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def came(self, step: int) -> int | None:
        """The signal to end after this step, if there is one: the same in all processes."""
        if not self._is_shared:
            return self._came
        reached = multihost_utils.reached_preemption_sync_point(step)
        return signal.SIGTERM if reached else None

    def _note(self, number: int, _) -> None:
        self._came = number
        self.__exit__()
        if self._is_shared:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            print("\nThe run ends after this step, and is saved.", file=sys.stderr)
