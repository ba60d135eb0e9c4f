"""The training loop."""

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from sophia_optax import sophia_metrics

from . import data, step
from .attention import choose_kernel
from .config import Config, ConfigError
from .optimizer import make_optimizer, make_schedule
from .sharding import shard_batch
from .step import TrainState

Row = dict[str, Any]  # a row of metrics.jsonl
SOPHIA_METRICS = ("unclipped_fraction", "refreshes", "refused")


def print_row(row: Row) -> None:
    print(", ".join(f"{name} {value:.6g}" for name, value in row.items()), flush=True)


def train(
    config: Config,
    corpus: data.Corpus,
    start: tuple[int, TrainState] | None = None,
    log: Callable[[Row], None] = print_row,
    save: Callable[[int, TrainState], None] = lambda number, state: None,
    should_stop: Callable[[int], bool] = lambda number: False,
) -> TrainState:
    """Train on the current mesh, and return the final state.

    Training resumes from `start`, the number of completed steps and the state after them.
    By default, it starts with random parameters, prints metrics, and saves nothing.
    `operations.run` implements `log` and `save` for a run with an output folder.
    """
    mesh, output, steps = jax.sharding.get_mesh(), config.output, config.training.steps
    config.check()
    corpus.check(config.model)
    step.check_mesh(config, mesh)
    choose_kernel(config.model, config.model.context)  # raises before any compilation
    schedule = make_schedule(config)
    tx = make_optimizer(config, schedule)
    train_step = step.make_train_step(config, tx, mesh)
    with open_batches(config, corpus.validation, seed=0) as batches:
        validation = [next(batches) for _ in range(output.validation_batches)]
    done, state = start or (0, step.init_state(config, tx, mesh))
    timed_from = None  # (step, its end time), or None until steps are compiled
    with open_batches(config, corpus.train, config.seed, done) as batches:
        for number in range(done + 1, steps + 1):
            tokens = shard_batch(mesh, next(batches))
            state, metrics = train_step(state, tokens)
            is_last = number == steps
            stops = should_stop(number)
            validates = is_last or number % output.validate_every == 0
            logs = validates or number % output.log_every == 0
            saves = is_last or stops or number % output.checkpoint_every == 0
            if not (logs or saves):
                continue
            row = make_row(config, number, schedule, metrics, state.opt_state)
            if timed_from is not None:
                seconds = (time.perf_counter() - timed_from[1]) / (number - timed_from[0])
                row["tokens_per_second"] = tokens[:, 1:].size / seconds
            if validates:
                row["val_loss"] = mean_validation_loss(config, state.params, validation)
            if logs:
                log(row)
            if saves:
                save(number, state)
            if stops:
                break
            timed_from = number, time.perf_counter()
    return state


def open_batches(config: Config, tokens: data.Tokens, seed: int, start: int = 0) -> Any:
    """Return a context manager for the batches of `tokens` after the first `start`."""
    batch, context = config.training.batch, config.model.context
    return contextlib.closing(data.batches(tokens, batch, context, seed, start))


def mean_validation_loss(config: Config, params: Any, batches: list[np.ndarray]) -> float:
    """Return the mean loss over validation batches."""
    sharded = (shard_batch(jax.sharding.get_mesh(), batch) for batch in batches)
    losses = [step.validation_loss(config, params, tokens) for tokens in sharded]
    return float(np.mean(jax.device_get(losses)))


def make_row(
    config: Config, number: int, schedule: optax.Schedule, metrics: Row, opt_state: Any
) -> Row:
    """Wait for a training step to finish, and return its metrics.

    Raise ConfigError if the loss or the gradient norm is not finite.
    """
    values = metrics | {"lr": schedule(number - 1)}
    if "sophia" in config.optimizer:
        values |= sophia_row(opt_state)
    row = {name: float(value) for name, value in jax.device_get(values).items()}
    for name in ("loss", "grad_norm"):
        if not math.isfinite(row[name]):
            raise ConfigError(
                f"`{name}` of step {number} is {row[name]}: training stopped. "
                "Try a lower --learning-rate."
            )
    return {"step": number} | row


@jax.jit
def sophia_row(opt_state: optax.OptState) -> Row:
    """Return the metrics in `SOPHIA_METRICS` from Sophia's state."""
    metrics = sophia_metrics(opt_state)
    return {name: metrics[name] for name in SOPHIA_METRICS}
