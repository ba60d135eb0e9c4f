"""A training run with an output folder: checkpoints, metrics, and stop signals."""

import contextlib
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from examples.gpt.core import data, sharding, step
from examples.gpt.core.config import Config
from examples.gpt.core.optimizer import make_optimizer, make_schedule
from examples.gpt.core.train import Row, print_row
from examples.gpt.operations import checkpoints, folders, processes

METRICS = "metrics.jsonl"
TOKENIZER = "tokenizer"  # subfolder of a run's folder


@contextlib.contextmanager
def open_run(
    config: Config,
    corpus: data.Corpus,
    folder: Path,
    initial_params: Callable[[Config], Any] = lambda config: None,
) -> Iterator["Run"]:
    """Lock a folder, and start or resume its run, with the config's defaults resolved.

    A new run starts from `initial_params(config)` or, if None, from random parameters.
    On exit, wait until all checkpoints are written. After a stop signal, end the process.
    """
    with contextlib.ExitStack() as stack:
        with processes.raise_on_all_processes():
            if processes.is_first_process():  # holds the lock for all processes
                stack.enter_context(folders.lock_folder(folder, "training in"))
            checkpoint = checkpoints.find_to_resume(config, folder)
            config = resolve(config, corpus, checkpoint)
        with processes.raise_on_all_processes():
            start = load_start(config, checkpoint, initial_params)
            run = Run(config, corpus, folder, start)
        stack.callback(run.close)
        yield run
    if run.signal.number is not None:
        if processes.is_first_process():
            print(f"The run is saved in {folder}. The same command resumes it.")
        sys.exit(128 + run.signal.number)  # nonzero, so that a launcher restarts the run


def resolve(config: Config, corpus: data.Corpus, checkpoint: Path | None) -> Config:
    """Return the config with resolved defaults. Raise ConfigError if it is invalid."""
    saved = {} if checkpoint is None else checkpoints.load_saved_config(checkpoint)
    config = config.with_resolved_defaults(
        corpus.tokenizer.vocabulary,
        sharding.num_batch_shards(jax.sharding.get_mesh()),
        saved,
        corpus.tokenizer.end_of_document,
    )
    config.check()
    corpus.check(config.model)
    if checkpoint is not None:
        checkpoints.check_same_run(config, corpus.checksum, checkpoint)
    return config


def load_start(
    config: Config, checkpoint: Path | None, initial_params: Callable[[Config], Any]
) -> tuple[int, step.TrainState]:
    """Return the number of completed steps, and the training state after them."""
    mesh, tx = jax.sharding.get_mesh(), make_optimizer(config, make_schedule(config))
    if checkpoint is None:
        return 0, step.init_state(config, tx, mesh, initial_params(config))
    abstract = step.abstract_state(config, tx, mesh)._asdict()
    state = step.TrainState(**checkpoints.load(checkpoint, abstract))
    return int(checkpoint.name), state


class Run:
    """A run opened by `open_run`. It writes its metrics and checkpoints to its folder."""

    def __init__(
        self,
        config: Config,
        corpus: data.Corpus,
        folder: Path,
        start: tuple[int, step.TrainState],
    ):
        self.config, self.start = config, start
        self.signal = processes.StopSignal()
        self.rows: list[Row] = []
        self._folder, self._wandb = folder, None
        self._checkpointer = checkpoints.open_checkpointer(folder, config.output)
        if not processes.is_first_process():
            return
        done, steps = start[0], config.training.steps
        verb = "resumes from" if done else "starts at"
        print(f"{config.optimizer} {verb} step {done} of {steps}.")
        self.rows = [row for row in read_rows(folder) if row["step"] <= done]
        values = config.as_json() | {checkpoints.CHECKSUM: corpus.checksum}
        folders.write_json(folder / "config.json", values)
        self._write_rows()
        save_tokenizer(folder, corpus.tokenizer)
        if config.output.wandb is not None:
            import wandb  # pyright: ignore[reportMissingImports]

            # The ID depends only on the folder, so a resumed run continues its own W&B run.
            name = f"{zlib.crc32(str(checkpoints.absolute(folder)).encode()):08x}"
            self._wandb = wandb.init(
                project=config.output.wandb, id=name, config=values, resume="allow"
            )

    def log(self, row: Row) -> None:
        """Print metrics, and add them to metrics.jsonl and Weights & Biases."""
        if not processes.is_first_process():
            return
        print_row(row)
        self.rows.append(row)
        if isinstance(self._folder, Path):  # object stores do not support appending
            with (self._folder / METRICS).open("a") as file:
                file.write(json.dumps(row) + "\n")
        if self._wandb is not None:
            self._wandb.log(row, row["step"])

    def save(self, number: int, state: step.TrainState) -> None:
        """Copy the state, and write the copy to a checkpoint while training continues."""
        with folders.reraise_write_errors(self._folder):
            if processes.is_first_process() and not isinstance(self._folder, Path):
                self._write_rows()
            self._checkpointer.save_checkpointables_async(
                number, state._asdict(), force=True, overwrite=True
            )

    def close(self) -> None:
        """Wait until all checkpoints and metrics are written."""
        with folders.reraise_write_errors(self._folder):
            self._checkpointer.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write_rows(self) -> None:
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        folders.write_bytes(self._folder / METRICS, lines.encode())


def read_rows(folder: Path) -> list[Row]:
    """Return the rows of a run's metrics.jsonl, up to the first incomplete row."""
    metrics, rows = folder / METRICS, []
    with contextlib.suppress(ValueError):
        for line in metrics.read_text().splitlines() if metrics.exists() else []:
            rows.append(json.loads(line))
    return rows


def save_tokenizer(folder: Path, tokenizer: data.Tokenizer) -> None:
    """Write the tokenizer to a run's folder, for `tools.tokenizers.load` to read."""
    name, content = tokenizer.save()
    (folder / TOKENIZER).mkdir(exist_ok=True)
    folders.write_bytes(folder / TOKENIZER / name, content)
