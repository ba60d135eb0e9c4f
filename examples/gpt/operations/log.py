"""Where a run's figures go: files, lines, and dashboards if asked."""

import contextlib
import datetime
import json
import math
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from examples.gpt.core.config import Config
from examples.gpt.core.errors import ConfigError, need
from examples.gpt.operations.folder import write_bytes, write_json, writing_to
from examples.gpt.operations.processes import is_first

METRICS = "metrics.jsonl"
Row = dict[str, Any]  # the keys of metrics.jsonl

# Of one chip in bfloat16, by the makers' data sheets; the first name that fits is taken.
PEAK_TERAFLOPS = {
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5": 459,
    "TPU v6 lite": 918,
    "NVIDIA A100": 312,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100": 989,
    "NVIDIA H200": 989,
    "NVIDIA B200": 2250,
}


class Log:
    """Writes config.json and metrics.jsonl, whose rows after `step` it forgets."""

    def __init__(self, config: Config, folder: Path, step: int, flops_per_token: float):
        self.rows: list[Row] = []
        self._pending: Row | None = None
        self._config, self._folder, self._flops = config, folder, flops_per_token
        self._metrics = folder / METRICS
        self._since: tuple[int, float] | None = None  # a step, and when it was done
        self._tensorboard = self._wandb = None
        if not is_first():
            return
        with writing_to(folder):
            write_json(folder / "config.json", config.as_json())
            self.rows = [row for row in read(folder) if row["step"] <= step]
        self._write_rows()
        if config.output.tensorboard:
            import tensorboardX

            self._tensorboard = tensorboardX.SummaryWriter(str(folder / "tensorboard"))
        if config.output.wandb is not None:
            import wandb  # pyright: ignore[reportMissingImports]

            # The same folder is the same run: a resumed one goes on in its curves.
            name = folder / "wandb_id"
            if not name.exists():
                name.write_text(uuid.uuid4().hex)
            self._wandb = wandb.init(
                project=config.output.wandb,
                id=name.read_text(),
                resume="allow",
                dir=folder if isinstance(folder, Path) else None,
                config=config.as_json(),
            )

    def step(self, row: Row, is_logged: bool) -> None:
        """Takes what a step made, and writes the row of the step before meanwhile."""
        self.write()
        self._pending = row if is_logged else None

    def write(self, validate: Callable[[], float] | None = None) -> None:
        """Waits for the last step, if it is logged, and writes its row."""
        if self._pending is None:
            return
        made, self._pending = jax.device_get(self._pending), None
        row: Row = {k: v if k == "step" else float(v) for k, v in made.items()}
        row |= self._speed(row["step"])
        require_finite(row)
        if validate is not None:
            row["val_loss"] = validate()
        self.rows.append(row)
        if not is_first():
            return
        if isinstance(self._folder, Path):
            with writing_to(self._folder), self._metrics.open("a") as file:
                file.write(json.dumps(row) + "\n")
        step, steps = row["step"], self._config.training.steps
        print(f"{self._config.optimizer} step {step} of {steps}: {_text(row)}", flush=True)
        numbers = {k: v for k, v in row.items() if v is not None and k != "step"}
        if self._tensorboard:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        if self._wandb:
            self._wandb.log(numbers, step)

    def close(self) -> None:
        """However the run ended, its rows are kept."""
        with contextlib.suppress(ConfigError):  # beside another error, perhaps the same
            self.flush()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def flush(self) -> None:
        """Writes all rows to an object store, whose files can't grow by a row."""
        if is_first() and not isinstance(self._folder, Path):
            self._write_rows()

    def _write_rows(self) -> None:
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        with writing_to(self._folder):
            write_bytes(self._metrics, lines.encode())

    def restart_clock(self, step: int) -> None:
        """After this step and what else was done: no speed counts it."""
        self._since = step, time.perf_counter()

    def _speed(self, step: int) -> Row:
        """Of the training steps to this one, which is done, since the row before."""
        since, self._since = self._since, (step, time.perf_counter())
        if since is None:  # the first steps of a process compile
            return dict.fromkeys(("tokens_per_second", "mfu", "seconds_to_go"))
        seconds = (self._since[1] - since[1]) / (step - since[0])
        speed = self._config.training.batch * self._config.model.context / seconds
        peak = _peak_flops(self._config.model.dtype)
        return {
            "tokens_per_second": speed,
            "mfu": None if peak is None else speed * self._flops / peak,
            "seconds_to_go": seconds * (self._config.training.steps - step),
        }


def require_finite(row: Row) -> None:
    """Raises ConfigError for a step whose loss or gradient is not finite."""
    for name in ("loss", "grad_norm"):
        text = f"`{name}` of step {row['step']} is {float(row[name])}: training is stopped."
        need(math.isfinite(row[name]), f"{text} Try a lower --learning-rate.")


def _text(row: Row) -> str:
    text = f"loss {row['loss']:.3f}, lr {row['lr']:.1e}"
    if "unclipped_fraction" in row:
        text += f", unclipped {row['unclipped_fraction']:.0%}"
    if row["tokens_per_second"] is not None:
        to_go = datetime.timedelta(seconds=round(row["seconds_to_go"]))
        text += f", {row['tokens_per_second']:,.0f} tokens/s, {to_go} to go"
    if row["mfu"] is not None:
        text += f", MFU {row['mfu']:.0%}"
    if "val_loss" in row:
        text += f", val loss {row['val_loss']:.3f}"
    return text


def read(folder: Path) -> list[Row]:
    """The rows of a run's metrics.jsonl, up to the first that is not whole."""
    metrics, rows = folder / METRICS, []
    with contextlib.suppress(ValueError):
        for line in metrics.read_text().splitlines() if metrics.exists() else []:
            rows.append(json.loads(line))
    return rows


def _peak_flops(dtype: str) -> float | None:
    """Of all devices together in this arithmetic, if the chip is known."""
    kind = jax.devices()[0].device_kind
    peaks = [peak for name, peak in PEAK_TERAFLOPS.items() if kind.startswith(name)]
    # A TPU multiplies float32 as bfloat16; NVIDIA's as TensorFloat-32, at half the speed.
    part = 0.5 if dtype == "float32" and "NVIDIA" in kind else 1.0
    return part * peaks[0] * 1e12 * jax.device_count() if peaks else None
