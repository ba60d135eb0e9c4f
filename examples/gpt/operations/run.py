"""A run with a folder: checkpoints, metrics, and signals to stop it."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from examples.gpt.core import data, step
from examples.gpt.core.config import Config, ConfigError
from examples.gpt.core.train import Row, Run, require_finite
from examples.gpt.operations import folders, processes
from examples.gpt.operations.checkpoints import CHECKPOINTS, Checkpoints
from examples.gpt.operations.log import Log

TOKENIZER = "tokenizer"  # a folder in that of a run


@contextlib.contextmanager
def open_run(
    config: Config,
    corpus: data.Corpus,
    folder: Path,
    initial_params: Callable[[Config], Any] = lambda config: None,
) -> Iterator["SavedRun"]:
    """Open a run in a folder, which is locked.

    A new run starts from `initial_params(config)`, or from random parameters if it is None.
    At the end all checkpoints are written. After a signal the process exits.
    """
    with contextlib.ExitStack() as stack:
        with processes.raise_on_all_processes():  # the first process holds the lock for all
            if processes.is_first_process():
                stack.enter_context(folders.lock_folder(folder, "training in"))
        signal = stack.enter_context(processes.StopSignal())
        checkpoints = Checkpoints(folder / CHECKPOINTS, config, corpus.identity)
        stack.enter_context(checkpoints)
        run = SavedRun(folder, corpus.tokenizer, initial_params, checkpoints, signal)
        stack.callback(run.close)
        stack.enter_context(processes.exit_if_a_process_is_lost())
        yield run
    if signal.number is not None:
        if processes.is_first_process():
            print(f"Step {run.done} is saved in {folder}. The same command resumes it.")
        sys.exit(128 + signal.number)  # tells a launcher to start the run again


class SavedRun(Run):
    """The side effects of a run in a folder: see `open_run`."""

    def __init__(self, folder, tokenizer, initial_params, checkpoints, signal):
        super().__init__()
        self.done = 0  # steps
        self._folder, self._tokenizer = folder, tokenizer
        self._initial_params = initial_params
        self._checkpoints, self._signal = checkpoints, signal
        self._log: Any = None

    def start(self, config, tx, mesh) -> tuple[int, step.TrainState, Any]:
        steps = config.training.steps
        restored = self._checkpoints.restore(step.abstract_state(config, tx, mesh))
        if restored is None:
            params = self._initial_params(config)
            restored = 0, step.init_state(config, tx, mesh, params), None
        elif restored[0] > steps:
            raise ConfigError(f"`steps` must be at least {restored[0]}, got {steps}.")
        elif processes.is_first_process():
            what = "is done at" if restored[0] == steps else "resumes from"
            print(f"{config.optimizer} {what} step {restored[0]} of {steps}.")
        self.done = restored[0]
        with processes.raise_on_all_processes():
            self._log = Log(config, self._folder, self.done)
            self.rows = self._log.rows
            if processes.is_first_process():
                save_tokenizer(self._folder, self._tokenizer)
        return restored

    def end_step(
        self, number: int, state: step.TrainState, row: Row, is_logged: bool
    ) -> bool:
        self.done, self._row = number, row | {"step": number}
        self._log.add(self._row, is_logged)
        return self._signal.came(number)

    def flush(self, validate: Callable[[], float] | None) -> None:
        with processes.raise_on_all_processes():
            require_finite(jax.device_get(self._row))  # before it is saved
            self._log.write(validate)
            self._log.flush()
        self._log.restart_clock(self.done)

    def save(self, number: int, state: step.TrainState, position: dict[str, Any]) -> None:
        self._checkpoints.save(number, state, position)
        self._log.restart_clock(number)

    def close(self) -> None:
        if self._log is not None:
            self._log.close()


def save_tokenizer(folder: Path, tokenizer: data.Tokenizer) -> None:
    """Write the tokenizer to the folder of a run: one file, which `tools` read."""
    name, content = tokenizer.save()
    with folders.writing_to(folder):
        (folder / TOKENIZER).mkdir(exist_ok=True)
        folders.write_bytes(folder / TOKENIZER / name, content)
