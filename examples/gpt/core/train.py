"""The training loop."""

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from sophia_optax import sophia_metrics

from . import data, step
from .attention import choose_kernel
from .config import Config, ConfigError
from .optimizer import make_optimizer, make_schedule
from .sharding import local_rows, shard_batch
from .step import TrainState

Row = dict[str, Any]  # of metrics.jsonl
SOPHIA_METRICS = ("unclipped_fraction", "refreshes", "refused")


class Run:
    """The side effects of a run. This one prints metrics, and saves nothing.

    `operations.run.open_run` opens one with checkpoints, metrics.jsonl and signals.
    """

    def __init__(self):
        self.rows: list[Row] = []

    def start(
        self, config: Config, tx: optax.GradientTransformation, mesh: Mesh
    ) -> tuple[int, TrainState, dict[str, Any] | None]:
        """Return the number of steps done, the state, and the position in the data."""
        return 0, step.init_state(config, tx, mesh), None

    def end_step(self, number: int, state: TrainState, row: Row, is_logged: bool) -> bool:
        """Log the metrics of a step. Return whether the run must stop after it."""
        self._row, self._is_logged = row | {"step": number}, is_logged
        if is_logged:
            self.rows.append(jax.device_get(self._row))
            print(", ".join(f"{k} {v:.4g}" for k, v in self.rows[-1].items()), flush=True)
        return False

    def flush(self, validate: Callable[[], float] | None) -> None:
        """Raise ConfigError for a loss that is not finite; validate, and log the result."""
        require_finite(jax.device_get(self._row))
        if validate is not None:
            self.rows[-1]["val_loss"] = validate()
            print(f"val loss {self.rows[-1]['val_loss']:.3f}", flush=True)

    def save(self, number: int, state: TrainState, position: dict[str, Any]) -> None:
        """Do nothing: this run has no checkpoints."""


def train(config: Config, corpus: data.Corpus, run: Run) -> TrainState:
    """Train on the mesh that is set, and return the last state."""
    mesh, output, steps = jax.sharding.get_mesh(), config.output, config.training.steps
    step.check_mesh(config, mesh)
    choose_kernel(config.model, config.model.context)  # raises here, not in the compiler
    schedule = make_schedule(config)
    tx = make_optimizer(config, schedule)
    train_step = step.make_train_step(config, tx, mesh)
    validate = make_validation(config, corpus.validation, mesh)
    done, state, position = run.start(config, tx, mesh)
    with open_batches(config, corpus.train, config.seed, mesh) as batches:
        if position is not None:
            batches.set_state(position)
        for number in range(done + 1, steps + 1):
            tokens = shard_batch(mesh, next(batches), config.training.batch)
            state, row = train_step(state, tokens)
            is_last = number == steps
            validates = is_last or number % output.validate_every == 0
            is_logged = validates or number % output.log_every == 0
            if is_logged:
                row["lr"] = schedule(number - 1)
                if "sophia" in config.optimizer:
                    row |= sophia_row(state.opt_state)
            stops = run.end_step(number, state, row, is_logged)
            saves = stops or is_last or number % output.checkpoint_every == 0
            if validates or saves:
                run.flush(partial(validate, state.params) if validates else None)
            if saves:
                run.save(number, state, batches.get_state())
            if stops:
                break
    return state


def open_batches(config: Config, tokens: data.Tokens, seed: int, mesh: Mesh) -> Any:
    """Open the batches of a split, with the rows that this process's devices hold."""
    batch, context = config.training.batch, config.model.context
    rows = local_rows(mesh, batch)
    return contextlib.closing(data.batches(tokens, batch, context, seed, rows))


def make_validation(
    config: Config, tokens: data.Tokens, mesh: Mesh
) -> Callable[[Any], float]:
    """Return a function from parameters to the mean loss of a split's first batches."""
    with open_batches(config, tokens, 0, mesh) as batches:
        held = [next(batches) for _ in range(config.output.validation_batches)]

    def validate(params: Any) -> float:
        sharded = (shard_batch(mesh, rows, config.training.batch) for rows in held)
        losses = [step.validation_loss(config, params, tokens) for tokens in sharded]
        return float(np.mean(jax.device_get(losses)))

    return validate


@jax.jit
def sophia_row(opt_state: optax.OptState) -> Row:
    """Return the metrics that Sophia's state has."""
    metrics = sophia_metrics(opt_state)
    return {name: metrics[name] for name in SOPHIA_METRICS}


def require_finite(row: Row) -> None:
    """Raise ConfigError if the loss or the gradient of a step is not finite."""
    for name in ("loss", "grad_norm"):
        if not math.isfinite(row[name]):
            raise ConfigError(
                f"`{name}` of step {row['step']} is {float(row[name])}: training stopped. "
                "Try a lower --learning-rate."
            )
