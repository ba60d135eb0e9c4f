"""Several processes as one run, and the signal to leave it."""

import contextlib
import dataclasses
import glob
import importlib.util
import os
import re
import signal
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from examples.gpt.core.config import Processes
from examples.gpt.core.errors import ConfigError, errors_as, need

LOST = os.EX_TEMPFAIL  # 75: start again, it was another process that was lost


def join(config: Processes) -> None:
    """Joins the other processes, if there are any, before anything is computed."""
    given = dataclasses.astuple(config)
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/*")
    has_others = (
        None not in given
        or (chips and importlib.util.find_spec("libtpu"))  # on Cloud TPU
        or int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1
        or {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys()
    )
    if not has_others:
        return
    with errors_as("The processes did not find each other", RuntimeError, ValueError):
        # Where collectives do not fail themselves, a lost process is known by its silence.
        jax.distributed.initialize(*given, heartbeat_timeout_seconds=20)


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def anywhere(flag: bool) -> bool:
    """Whether the flag is set on any process."""
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def check_same(choices: dict[str, Any]) -> None:
    """Raises ConfigError, on all processes, if they were not given the same."""
    mine = np.uint32(zlib.crc32(repr(sorted(choices.items())).encode()))
    same = np.all(multihost_utils.process_allgather(mine) == mine)
    need(bool(same), "All processes need the same flags, but for `process_id`.")


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
    """Where another process was lost, this one ends at once: JAX would wait for it."""
    lost = "unavailable|heartbeat|preempt|connection (closed|reset)|socket closed"
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        if jax.process_count() == 1 or not re.search(lost, reason, re.IGNORECASE):
            raise
        message = f"error: Another process of the run was lost ({reason}). Start all again."
        print(message, file=sys.stderr, flush=True)
        os._exit(LOST)


def check_shared(path: Path) -> None:
    """Raises ConfigError if this process does not see what the first has written."""
    end = time.monotonic() + 30  # file systems of clusters may take a while
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.1)
    need(path.exists(), f"`out` must be a folder that all processes see: no {path} here.")


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
        if self._is_shared and multihost_utils.reached_preemption_sync_point(step):
            self._came = signal.SIGTERM
        return self._came

    def _note(self, number: int, _) -> None:
        self.__exit__()
        if self._is_shared:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._came = number
            print("\nThe run ends after this step, and is saved.", file=sys.stderr)
