"""Several processes as one run, and the signal to leave it."""

import contextlib
import glob
import importlib.util
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from examples.gpt.config import Config, ConfigError


class Interrupted(Exception):
    """The run was told to end, and has saved where it is."""


def join(config: Config) -> None:
    """Joins the other processes, if there are any; before anything is computed."""
    given: Any = (config.coordinator, config.num_processes, config.process_id)
    if None not in given:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    elif _on_cloud_tpu() or _in_slurm_step() or _in_kubernetes_job():
        given = ()
    else:
        return
    try:
        jax.distributed.initialize(*given)
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
    """Takes note of SIGTERM, so that the run may end after a step and lose nothing."""

    def __enter__(self) -> "Signal":
        self._came = False
        self._before = None
        if not jax.distributed.is_initialized():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def came(self, step: int) -> bool:
        """Whether to end after this step: the same one in all processes."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._came

    def _note(self, *_) -> None:
        self._came = True


def _on_cloud_tpu() -> bool:
    has_chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*")
    return bool(has_chips) and importlib.util.find_spec("libtpu") is not None


def _in_slurm_step() -> bool:
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def _in_kubernetes_job() -> bool:
    return {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys()
