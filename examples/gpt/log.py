"""Where a run's figures go: a file, and a progress bar or lines."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import tqdm

from examples.gpt.config import Config, ConfigError

Row = dict[str, Any]  # the keys of metrics.jsonl


class Log:
    """Writes config.json and metrics.jsonl, and shows how far a run is."""

    def __init__(self, config: Config, folder: Path):
        self.rows: list[Row] = []
        self._config = config
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(config.as_json(), indent=2) + "\n"
            (folder / "config.json").write_text(text)
        except OSError as error:
            raise ConfigError(f"`out`: {folder} can't be written to: {error}.") from error
        self._metrics = folder / "metrics.jsonl"
        self._is_terminal = sys.stdout.isatty()
        self._bar = tqdm.tqdm(
            total=config.steps,
            desc=config.optimizer,
            unit="step",
            file=sys.stdout,
            disable=not self._is_terminal,
        )

    def start_clock(self, step: int, result: jax.Array) -> None:
        """Counts tokens a second from here on, once the result of this step is there."""
        jax.block_until_ready(result)
        self._last_step, self._last_time = step, time.perf_counter()

    def tokens_per_second(self, step: int) -> float:
        """Since the row before, or the first step."""
        tokens = (step - self._last_step) * self._config.batch * self._config.context
        return tokens / (time.perf_counter() - self._last_time)

    def write(self, row: Row) -> None:
        self.rows.append(row)
        with self._metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")
        text = f"loss {row['loss']:.3f}, lr {row['lr']:.1e}"
        if row["unclipped_fraction"] is not None:
            text += f", unclipped {row['unclipped_fraction']:.0%}"
        text += f", {row['tokens_per_second']:,.0f} tokens/s"
        if "val_loss" in row:
            text += f", val loss {row['val_loss']:.3f}"
        if self._is_terminal:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(row["step"] - self._bar.n)
        elif "val_loss" in row:
            print(f"{self._config.optimizer} step {row['step']}: {text}", flush=True)
        self._last_step, self._last_time = row["step"], time.perf_counter()

    def close(self) -> None:
        self._bar.close()
