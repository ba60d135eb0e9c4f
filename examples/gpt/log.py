"""Where a run's figures go: files, a progress bar or lines, and dashboards if asked."""

import json
import math
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm

from examples.gpt.config import Config, ConfigError
from examples.gpt.folder import writing_to
from examples.gpt.processes import is_first

Row = dict[str, Any]  # the keys of metrics.jsonl
Dashboard = tuple[Callable[[Row], None], Callable[[], None]]  # to write a row, to close

# Of one chip in bfloat16, by the makers' data sheets: 10^12 operations a second.
PEAK_TERAFLOPS = {
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5p": 459,
    "TPU v5": 459,
    "TPU v6 lite": 918,
    "NVIDIA A100": 312,
    "NVIDIA H100": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H200": 989,
    "NVIDIA B200": 2250,
}


class NotFinite(ConfigError):
    """A loss or a gradient that is not finite: most often the learning rate is too high."""


class Log:
    """Writes config.json and metrics.jsonl, and shows how far a run is.

    Args:
      config: the run.
      folder: where the files go.
      step: the step that it goes on from; rows of later ones are forgotten.
      flops_per_token: operations, from which MFU is counted.
    """

    def __init__(self, config: Config, folder: Path, step: int, flops_per_token: float):
        self.rows: list[Row] = []
        self._pending: tuple[Row, bool] | None = None
        self._config, self._folder = config, folder
        self._flops_per_token = flops_per_token
        self._is_terminal = sys.stdout.isatty()
        self._dashboards: list[Dashboard] = []
        self._last: tuple[int, float] | None = None
        if not is_first():
            self._bar = tqdm.tqdm(disable=True)
            return
        with writing_to(folder):
            text = json.dumps(config.as_json(), indent=2) + "\n"
            (folder / "config.json").write_text(text)
            self.rows = [row for row in read(folder) if row["step"] <= step]
            kept = folder / "metrics.jsonl.kept"  # a full disk loses no row
            kept.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
            kept.replace(folder / "metrics.jsonl")
        self._dashboards = [*_dashboards(config, folder)]
        self._bar = tqdm.tqdm(
            total=config.steps,
            initial=step,
            desc=config.optimizer,
            unit="step",
            file=sys.stdout,
            disable=not self._is_terminal,
        )

    def step(self, row: Row, is_written: bool) -> None:
        """Takes what a step made, and fetches the row of the step before.

        So the device is at work on this step while the host waits for that one.

        Args:
          row: numbers, arrays of shape (), or lists of them, whose mean counts.
          is_written: whether it goes to the files, or only its loss is looked at.

        Raises:
          NotFinite: if the loss or the gradient's norm of the step before is not finite.
        """
        self.flush()
        self._pending = row, is_written

    def flush(self) -> None:
        """Fetches the last row, too."""
        if self._pending is None:
            return
        (pending, is_written), self._pending = self._pending, None
        fetched = {k: jax.device_get(v) for k, v in pending.items()}
        row: Row = {k: None if v is None else float(np.mean(v)) for k, v in fetched.items()}
        row["step"] = int(pending["step"])
        for name in ("loss", "grad_norm"):
            if not math.isfinite(row[name]):
                raise NotFinite(
                    f"`{name}` of step {row['step']} is {row[name]}: training is stopped. "
                    "Most often a lower --learning-rate, in another --out, cures it."
                )
        if is_written:
            self._write(row | self._speed(row["step"]))

    def _write(self, row: Row) -> None:
        self.rows.append(row)
        if not is_first():
            return
        with writing_to(self._folder, " The same command, started again, goes on."):
            self._write_line(row)
        for write, _ in self._dashboards:
            write(row)
        if self._is_terminal:
            self._bar.set_postfix_str(f"loss {row['loss']:.3f}", refresh=False)
            self._bar.update(row["step"] - self._bar.n)
        if "val_loss" in row:
            text = f"{self._config.optimizer} step {row['step']}: {self._text(row)}"
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def _write_line(self, row: Row) -> None:
        with (self._folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self.flush()
        self._bar.close()
        for _, close in self._dashboards:
            close()

    def _speed(self, step: int) -> Row:
        now = time.perf_counter()
        before, self._last = self._last, (step, now)
        if before is None:  # the first steps of a process compile
            return {"tokens_per_second": None, "mfu": None, "seconds_to_go": None}
        seconds = (now - before[1]) / (step - before[0])
        speed = self._config.batch * self._config.context / seconds
        peak = _peak_flops()
        return {
            "tokens_per_second": speed,
            "mfu": None if peak is None else speed * self._flops_per_token / peak,
            "seconds_to_go": seconds * (self._config.steps - step),
        }

    def _text(self, row: Row) -> str:
        text = f"loss {row['loss']:.3f}, lr {row['lr']:.1e}"
        if row["unclipped_fraction"] is not None:
            text += f", unclipped {row['unclipped_fraction']:.0%}"
        if row["tokens_per_second"] is not None:
            text += f", {row['tokens_per_second']:,.0f} tokens/s"
            text += f", {tqdm.tqdm.format_interval(row['seconds_to_go'])} to go"
        if row["mfu"] is not None:
            text += f", MFU {row['mfu']:.0%}"
        if "val_loss" in row:
            text += f", val loss {row['val_loss']:.3f}"
        return text


def read(folder: Path) -> list[Row]:
    """The rows of a run's metrics.jsonl; of one cut short, those that are whole."""
    metrics, rows = folder / "metrics.jsonl", []
    for line in metrics.read_text().splitlines() if metrics.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _peak_flops() -> float | None:
    """Of all devices together; None where it is not known."""
    kind = jax.devices()[0].device_kind
    names = [name for name in PEAK_TERAFLOPS if kind.startswith(name)]
    if not names:
        return None
    return PEAK_TERAFLOPS[max(names, key=len)] * 1e12 * jax.device_count()


def _dashboards(config: Config, folder: Path) -> Iterator[Dashboard]:
    """What else each row is written to."""
    if config.tensorboard:
        import tensorboardX

        writer = tensorboardX.SummaryWriter(str(folder / "tensorboard"))

        def write(row):
            for name, value in _numbers(row).items():
                writer.add_scalar(name, value, row["step"])
            writer.flush()

        yield write, writer.close
    if config.wandb is not None:
        import wandb  # pyright: ignore[reportMissingImports]

        # The same folder is the same run: a resumed one goes on in its curves.
        name = folder / "wandb_id"
        if not name.exists():
            name.write_text(uuid.uuid4().hex)
        run = wandb.init(
            project=config.wandb,
            id=name.read_text(),
            resume="allow",
            reinit="create_new",
            dir=folder,
            config=config.as_json(),
        )
        yield lambda row: run.log(_numbers(row), step=row["step"]), run.finish


def _numbers(row: Row) -> Row:
    return {k: v for k, v in row.items() if v is not None and k != "step"}
