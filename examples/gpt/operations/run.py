"""A run with a folder: checkpoints, metrics, and signals to stop it."""

import contextlib
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from examples.gpt.core import data, step
from examples.gpt.core.config import Config
from examples.gpt.core.train import Row, Run
from examples.gpt.operations import checkpoints, folders, processes

METRICS = "metrics.jsonl"
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
            checkpoint = checkpoints.find_to_resume(config, corpus.checksum, folder)
        signal = processes.StopSignal()
        with processes.raise_on_all_processes():
            run = SavedRun(config, corpus, folder, checkpoint, initial_params, signal)
        stack.callback(run.close)
        yield run
    if signal.number is not None:
        if processes.is_first_process():
            print(f"The run is saved in {folder}. The same command resumes it.")
        sys.exit(128 + signal.number)  # tells a launcher to start the run again


class SavedRun(Run):
    """The side effects of a run in a folder: see `open_run`."""

    def __init__(self, config, corpus, folder, checkpoint, initial_params, signal):
        super().__init__()
        self._folder, self._signal = folder, signal
        self._checkpoint, self._initial_params = checkpoint, initial_params
        self._wandb = None
        self._checkpointer = checkpoints.open_checkpointer(folder, config.output)
        if not processes.is_first_process():
            return
        done = 0 if checkpoint is None else int(checkpoint.name)
        self.rows = [row for row in read_rows(folder) if row["step"] <= done]
        values = config.as_json() | {checkpoints.CHECKSUM: corpus.checksum}
        with folders.writing_to(folder):
            folders.write_json(folder / "config.json", values)
            self._write_rows()
            save_tokenizer(folder, corpus.tokenizer)
        if config.output.wandb is not None:
            import wandb  # pyright: ignore[reportMissingImports]

            # The same folder is the same run, also when it is resumed.
            name = f"{zlib.crc32(str(folder.absolute()).encode()):08x}"
            self._wandb = wandb.init(
                project=config.output.wandb, id=name, config=values, resume="allow"
            )

    def start(self, config, tx, mesh) -> tuple[int, step.TrainState]:
        done = 0
        if self._checkpoint is None:
            state = step.init_state(config, tx, mesh, self._initial_params(config))
        else:
            done, abstract = (
                int(self._checkpoint.name),
                step.abstract_state(config, tx, mesh),
            )
            state = step.TrainState(
                **checkpoints.load(self._checkpoint, abstract._asdict())
            )
        if processes.is_first_process():
            verb = "resumes from" if done else "starts at"
            print(f"{config.optimizer} {verb} step {done} of {config.training.steps}.")
        return done, state

    def must_stop(self, number: int) -> bool:
        return self._signal.came(number)

    def log(self, row: Row) -> None:
        if not processes.is_first_process():
            return
        super().log(row)
        if isinstance(self._folder, Path):  # objects in a store can't be appended to
            with (
                folders.writing_to(self._folder),
                (self._folder / METRICS).open("a") as file,
            ):
                file.write(json.dumps(row) + "\n")
        if self._wandb is not None:
            self._wandb.log(row, row["step"])

    def save(self, number: int, state: step.TrainState) -> None:
        """Copy the state, and write it while training continues."""
        with folders.writing_to(self._folder, Exception):
            if processes.is_first_process() and not isinstance(self._folder, Path):
                self._write_rows()
            self._checkpointer.save_checkpointables_async(
                number, state._asdict(), force=True, overwrite=True
            )

    def close(self) -> None:
        """Wait until all is written."""
        with folders.writing_to(self._folder, Exception):
            self._checkpointer.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write_rows(self) -> None:
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        folders.write_bytes(self._folder / METRICS, lines.encode())


def read_rows(folder: Path) -> list[Row]:
    """Return the rows of a run's metrics.jsonl, up to the first incomplete one."""
    metrics, rows = folder / METRICS, []
    with contextlib.suppress(ValueError):
        for line in metrics.read_text().splitlines() if metrics.exists() else []:
            rows.append(json.loads(line))
    return rows


def save_tokenizer(folder: Path, tokenizer: data.Tokenizer) -> None:
    """Write the tokenizer to the folder of a run: one file, which `tools` read."""
    name, content = tokenizer.save()
    (folder / TOKENIZER).mkdir(exist_ok=True)
    folders.write_bytes(folder / TOKENIZER / name, content)
