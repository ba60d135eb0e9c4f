"""Metrics of a run: config.json, metrics.jsonl, the terminal, and Weights & Biases."""

import contextlib
import datetime
import json
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import jax

from examples.gpt.core.config import Config
from examples.gpt.core.train import Row, require_finite
from examples.gpt.operations.folders import write_bytes, write_json, writing_to
from examples.gpt.operations.processes import is_first_process

METRICS = "metrics.jsonl"


class Log:
    """Writes config.json and the rows of metrics.jsonl. Drops rows after step `done`."""

    def __init__(self, config: Config, folder: Path, done: int):
        self.rows: list[Row] = []
        self._config, self._folder = config, folder
        self._pending: Row | None = None
        self._last: tuple[int, float] | None = None  # a step, and the time of its end
        self._wandb = None
        if not is_first_process():
            return
        with writing_to(folder):
            write_json(folder / "config.json", config.as_json())
            self.rows = [row for row in read_rows(folder) if row["step"] <= done]
            self._write_rows()
        if config.output.wandb is not None:
            import wandb  # pyright: ignore[reportMissingImports]

            # The same folder is the same run, also when it is resumed.
            run = {"id": f"{zlib.crc32(str(folder.absolute()).encode()):08x}"}
            run |= {"project": config.output.wandb, "config": config.as_json()}
            self._wandb = wandb.init(**run, resume="allow")

    def add(self, row: Row, is_logged: bool) -> None:
        """Take the row of a step that was started, and write the one before meanwhile."""
        self.write()
        self._pending = row if is_logged else None

    def write(self, validate: Callable[[], float] | None = None) -> None:
        """Wait for the last step, if it is logged, and write its row."""
        if self._pending is None:
            return
        values, self._pending = jax.device_get(self._pending), None
        row: Row = {k: v if k == "step" else float(v) for k, v in values.items()}
        row |= self._speed(row["step"])
        require_finite(row)
        if validate is not None:
            row["val_loss"] = validate()
        self.rows.append(row)
        if not is_first_process():
            return
        if isinstance(self._folder, Path):
            with writing_to(self._folder), (self._folder / METRICS).open("a") as file:
                file.write(json.dumps(row) + "\n")
        steps, text = self._config.training.steps, describe(row)
        print(f"{self._config.optimizer} step {row['step']} of {steps}: {text}", flush=True)
        if self._wandb:
            self._wandb.log({k: v for k, v in row.items() if v is not None}, row["step"])

    def close(self) -> None:
        with contextlib.suppress(Exception):  # another error may be under way
            self.flush()
        if self._wandb:
            self._wandb.finish()

    def flush(self) -> None:
        """Write all rows to an object store, where files can't be appended to."""
        if is_first_process() and not isinstance(self._folder, Path):
            with writing_to(self._folder):
                self._write_rows()

    def _write_rows(self) -> None:
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_bytes(self._folder / METRICS, lines.encode())

    def restart_clock(self, step: int) -> None:
        """Exclude the time of validation and checkpoints from the speed."""
        self._last = step, time.perf_counter()

    def _speed(self, step: int) -> Row:
        """Return the speed of the training steps since the row before."""
        last, self._last = self._last, (step, time.perf_counter())
        if last is None:  # the first steps of a process compile
            return {"tokens_per_second": None, "seconds_to_go": None}
        seconds = (self._last[1] - last[1]) / (step - last[0])
        tokens = self._config.training.batch * self._config.model.context
        to_go = seconds * (self._config.training.steps - step)
        return {"tokens_per_second": tokens / seconds, "seconds_to_go": to_go}


def read_rows(folder: Path) -> list[Row]:
    """Return the rows of a run's metrics.jsonl, up to the first incomplete one."""
    metrics, rows = folder / METRICS, []
    with contextlib.suppress(ValueError):
        for line in metrics.read_text().splitlines() if metrics.exists() else []:
            rows.append(json.loads(line))
    return rows


def describe(row: Row) -> str:
    """Return the text of a row for the terminal."""
    text = f"loss {row['loss']:.3f}, lr {row['lr']:.1e}"
    if "unclipped_fraction" in row:
        text += f", unclipped {row['unclipped_fraction']:.0%}"
    if row["tokens_per_second"] is not None:
        to_go = datetime.timedelta(seconds=round(row["seconds_to_go"]))
        text += f", {row['tokens_per_second']:,.0f} tokens/s, {to_go} to go"
    return text + (f", val loss {row['val_loss']:.3f}" if "val_loss" in row else "")
