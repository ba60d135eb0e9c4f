"""Where a run's figures go: files, lines, and dashboards if asked."""

import datetime
import json
import math
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

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
    """Writes config.json and metrics.jsonl, and prints a line for each row.

    Args:
      config: the run.
      folder: where the files go.
      step: the step that it goes on from; rows of later ones are forgotten.
      flops_per_token: operations, from which MFU is counted.
    """

    def __init__(self, config: Config, folder: Path, step: int, flops_per_token: float):
        self.rows: list[Row] = []
        self._pending: Row | None = None
        self._before: Any = None  # the loss of the last step
        self._config, self._folder = config, folder
        self._flops_per_token = flops_per_token
        self._dashboards: list[Dashboard] = []
        self._since: tuple[int, float] | None = None  # a step, and when it was done
        if not is_first():
            return
        with writing_to(folder):
            text = json.dumps(config.as_json(), indent=2) + "\n"
            (folder / "config.json").write_text(text)
            self.rows = [row for row in read(folder) if row["step"] <= step]
            kept = folder / "metrics.jsonl.kept"  # a full disk loses no row
            kept.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
            kept.replace(folder / "metrics.jsonl")
        self._dashboards = [*_dashboards(config, folder)]

    def step(self, row: Row, is_logged: bool) -> None:
        """Takes what a step made, arrays of shape (), while the device is at work on it.

        A row that is to be logged waits for the step before, and the row before is written.

        Raises:
          NotFinite: if the loss or the gradient's norm of the row before is not finite.
        """
        if is_logged:
            jax.block_until_ready(self._before)
            self.write()
            self._pending = row | self._speed(row["step"] - 1)
        self._before = row["loss"]

    def wait(self) -> None:
        """Waits for the numbers of the last step."""
        jax.block_until_ready(self._before)
        if self._pending is not None:
            row = jax.device_get(self._pending)
            step = row.pop("step")
            self._pending = {k: v if v is None else float(v) for k, v in row.items()}
            self._pending["step"] = step
            require_finite(self._pending)

    def write(self) -> None:
        """Writes the last row, if it is not written yet."""
        self.wait()
        row, self._pending = self._pending, None
        if row is None:
            return
        self.rows.append(row)
        if not is_first():
            return
        with writing_to(self._folder, " The same command, started again, goes on."):
            self._write_line(row)
        for write, _ in self._dashboards:
            write(row)
        name, steps = self._config.optimizer, self._config.training.steps
        print(f"{name} step {row['step']} of {steps}: {_text(row)}", flush=True)

    def restart_clock(self, step: int) -> None:
        """After what is no training step, and after this one: no speed counts it."""
        self._since = step, time.perf_counter()

    def add(self, **numbers: float) -> None:
        """Adds numbers to the last row."""
        assert self._pending is not None
        self._pending |= numbers

    def _write_line(self, row: Row) -> None:
        with (self._folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        for _, close in self._dashboards:
            close()

    def _speed(self, step: int) -> Row:
        """Of the training steps to this one, which is done, since the row before."""
        now = time.perf_counter()
        since, self._since = self._since, (step, now)
        if since is None or step <= since[0]:  # the first steps of a process compile
            return dict.fromkeys(("tokens_per_second", "mfu", "seconds_to_go"))
        seconds = (now - since[1]) / (step - since[0])
        speed = self._config.training.batch * self._config.model.context / seconds
        peak = _peak_flops(self._config.model.dtype)
        return {
            "tokens_per_second": speed,
            "mfu": None if peak is None else speed * self._flops_per_token / peak,
            "seconds_to_go": seconds * (self._config.training.steps - step),
        }


def require_finite(row: Row) -> None:
    """Raises NotFinite for a step whose loss or gradient is not finite."""
    for name in ("loss", "grad_norm"):
        if not math.isfinite(value := float(row[name])):
            raise NotFinite(
                f"`{name}` of step {row['step']} is {value}: training is stopped. Most "
                "often a lower --learning-rate, in another --out, cures it."
            )


def _text(row: Row) -> str:
    text = f"loss {row['loss']:.3f}, lr {row['lr']:.1e}"
    if row.get("unclipped_fraction") is not None:
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
    """The rows of a run's metrics.jsonl; of one cut short, those that are whole."""
    metrics, rows = folder / "metrics.jsonl", []
    for line in metrics.read_text().splitlines() if metrics.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _peak_flops(dtype: str) -> float | None:
    """Of all devices together, in the arithmetic that JAX uses for a dtype."""
    kind = jax.devices()[0].device_kind
    names = [name for name in PEAK_TERAFLOPS if kind.startswith(name)]
    if not names:
        return None
    peak = PEAK_TERAFLOPS[max(names, key=len)] * 1e12 * jax.device_count()
    # A TPU multiplies float32 as bfloat16; NVIDIA's as TensorFloat-32, at half the speed.
    return peak / 2 if dtype == "float32" and "NVIDIA" in kind else peak


def _dashboards(config: Config, folder: Path) -> Iterator[Dashboard]:
    """What else each row is written to."""
    if config.output.tensorboard:
        import tensorboardX

        writer = tensorboardX.SummaryWriter(str(folder / "tensorboard"))

        def write(row):
            for name, value in _numbers(row).items():
                writer.add_scalar(name, value, row["step"])
            writer.flush()

        yield write, writer.close
    if config.output.wandb is not None:
        import wandb  # pyright: ignore[reportMissingImports]

        # The same folder is the same run: a resumed one goes on in its curves.
        name = folder / "wandb_id"
        if not name.exists():
            name.write_text(uuid.uuid4().hex)
        run = wandb.init(
            project=config.output.wandb,
            id=name.read_text(),
            resume="allow",
            reinit="create_new",
            dir=folder,
            config=config.as_json(),
        )
        yield lambda row: run.log(_numbers(row), step=row["step"]), run.finish


def _numbers(row: Row) -> Row:
    return {k: v for k, v in row.items() if v is not None and k != "step"}
