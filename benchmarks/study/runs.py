"""Training runs of the study. One run per core at a time; each is stored when it ends."""

import concurrent.futures
import dataclasses
import functools
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.study.optimizers import (
    ForKind,
    Optimizer,
    Sophia,
    make_optimizer,
    make_refresh,
)
from benchmarks.study.tasks import TASKS

RESULTS = Path(__file__).parent / "results.jsonl"  # one line per run
CHUNK = 25  # number of steps per call of the compiled program
VALIDATIONS = 16  # number of evenly spaced validations per run


@dataclasses.dataclass(frozen=True)
class Settings:
    """Hyperparameters. They are arguments of a compiled program, not constants in it."""

    learning_rate: float
    b1: float = 0.875
    b2: float = 0.99
    gamma: float = 1.0
    fraction: float = 0.76  # target fraction of unclipped entries
    eps: float = 1e-12
    weight_decay: float = 0.25
    # Hyperparameters of NAdamW for the other parameters. Only `ForKind` uses them.
    adam_learning_rate: float = 0.0
    adam_b1: float = 0.0
    adam_b2: float = 0.0
    adam_weight_decay: float = 0.0
    decay_start: float = 0.1  # fraction of the steps before the learning rate decays
    final: float = 0.0  # learning rate at the end, as a fraction of the peak
    linear: float = 0.0  # 1 for a linear decay, 0 for a cosine
    average: float = 0.0  # window of the average of the weights, as a fraction of the steps


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run. All its random numbers depend on the seed."""

    task: str
    optimizer: Optimizer
    settings: Settings
    seed: int = 0
    steps: int = 400
    # Settings that change linearly in the second half, to these values at the end.
    ends: tuple[tuple[str, float], ...] = ()

    def with_settings(self, **values: float) -> "Run":
        """Return the run with these hyperparameters replaced."""
        settings = dataclasses.replace(self.settings, **values)
        return dataclasses.replace(self, settings=settings)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The validation losses of a run, in nats per byte."""

    losses: list[float]  # shorter than `VALIDATIONS` if the run diverged
    averaged: list[float]  # the losses of the averaged weights; empty without averaging

    @property
    def loss(self) -> float:
        """Return the final loss, of averaged weights if any. Infinite after divergence."""
        done = len(self.losses) == VALIDATIONS
        return (self.averaged or self.losses)[-1] if done else math.inf


def train(run: Run) -> Outcome:
    """Train a model and return its validation losses."""
    task, every = TASKS[run.task], run.steps // VALIDATIONS
    assert run.steps % (VALIDATIONS * CHUNK) == 0
    start = dataclasses.asdict(run.settings) | {"seed": run.seed, "steps": run.steps}
    settings = jax.tree.map(jnp.float32, (start, start | dict(run.ends)))
    make_state, advance, validate = _programs(run.task, run.optimizer)
    state, batches = make_state(settings, task.init(run.seed)), task.batches(run.seed)
    validation = task.validation()
    outcome = Outcome([], [])
    for number in range(CHUNK, run.steps + 1, CHUNK):
        tokens = np.stack([next(batches) for _ in range(CHUNK)])
        state = advance(settings, state, tokens)
        if number % every == 0:
            loss = float(validate(state[0], validation))
            if not math.isfinite(loss):
                break
            outcome.losses.append(round(loss, 6))
            if run.settings.average:
                loss = float(validate(state[2], validation))
                outcome.averaged.append(round(loss, 6))
    return outcome


@functools.cache
def _programs(name: str, optimizer: Optimizer) -> tuple[Any, Any, Any]:
    """Return three jitted functions: `make_state`, `advance` and `validate`.

    `make_state` returns the initial state: the parameters, the state of the optimizer, the
    average of the parameters, and the step number. `advance` runs `CHUNK` steps.
    """
    task = TASKS[name]
    refresh = make_refresh(task, optimizer)

    def make_state(settings, params):
        opt_state = make_optimizer(optimizer, values_at(settings, 0)).init(params)
        return params, opt_state, params, jnp.int32(0)

    def advance(settings, state, tokens):
        def step(state, tokens_BxS):
            params, opt_state, average, number = state
            values = values_at(settings, number)
            tx = make_optimizer(optimizer, values)
            grads, extra = jax.grad(task.loss_fn)(params, tokens_BxS), {}
            if refresh is not None:
                extra["hessian_fn"] = functools.partial(refresh, params, tokens_BxS)
            updates, opt_state = tx.update(grads, opt_state, params, **extra)
            params = optax.apply_updates(params, updates)
            window = jnp.maximum(values["average"] * values["steps"], 1)
            average = optax.incremental_update(params, average, 1 / window)
            return (params, opt_state, average, number + 1), None

        return jax.lax.scan(step, state, tokens)[0]

    def validate(params, validation):
        return jax.lax.map(functools.partial(task.loss_fn, params), validation).mean()

    return jax.jit(make_state), jax.jit(advance, donate_argnums=1), jax.jit(validate)


def values_at(settings: Any, number: Any) -> dict[str, Any]:
    """Return the hyperparameters at a step, with the learning rate of the schedule."""
    start, end = settings
    progress = number / start["steps"]
    late = jnp.clip(2 * progress - 1, 0, 1)  # 0 until half of the steps, then linear to 1
    values = {name: (1 - late) * start[name] + late * end[name] for name in start}
    done = jnp.clip((progress - values["decay_start"]) / (1 - values["decay_start"]), 0, 1)
    shape = jnp.where(values["linear"] > 0, 1 - done, 0.5 * (1 + jnp.cos(jnp.pi * done)))
    factor = jnp.minimum(progress / 0.1, 1) * (
        values["final"] + (1 - values["final"]) * shape
    )
    rates = ("learning_rate", "adam_learning_rate")
    values |= {name: factor * values[name] for name in rates}
    return values | {"seed": jnp.int32(start["seed"])}


Outcomes = Callable[[Iterable[Run]], dict[Run, Outcome]]  # `train_all` or `stored`


def stored(runs: Iterable[Run]) -> dict[Run, Outcome]:
    """Return the outcomes of stored runs. Raise KeyError if one is missing."""
    found = read()
    return {run: found[run] for run in runs}


def train_all(runs: Iterable[Run]) -> dict[Run, Outcome]:
    """Return the outcomes of these runs. Train the runs that are not stored yet."""
    runs, found = list(dict.fromkeys(runs)), read()
    missing = sorted((r for r in runs if r not in found), key=_order)
    if missing:
        print(f"{len(missing)} runs to go, {len(runs) - len(missing)} stored", flush=True)
        # A run is too small to use two cores, so each process runs on one core.
        context, cores = multiprocessing.get_context("spawn"), range(os.cpu_count() or 1)
        free = context.SimpleQueue()
        for core in cores:
            free.put(core)
        pools = concurrent.futures.ProcessPoolExecutor
        with pools(len(cores), context, _take_core, (free,)) as pool:
            for future in [pool.submit(train_and_store, run) for run in missing]:
                future.result()
    return stored(runs)


def _order(run: Run) -> tuple[int, str]:
    """Sort key: long runs first, and runs of the same compiled program together."""
    return -run.steps, repr((run.task, run.optimizer))


def _take_core(free: Any) -> None:
    """Pin this process to the next free core, if the operating system supports it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {free.get()})


def train_and_store(run: Run) -> None:
    outcome = train(run)
    line = {"run": _changed(run), "outcome": vars(outcome), "jax": jax.__version__}
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(f"{outcome.loss:.4f} {line['run']}", flush=True)


def _changed(instance: Any) -> Any:
    """Convert dataclasses to dicts of the fields that differ from their defaults."""
    if not dataclasses.is_dataclass(instance):
        return instance
    defaults = {f.name: f.default for f in dataclasses.fields(instance)}
    return {k: _changed(v) for k, v in vars(instance).items() if v != defaults[k]}


def _read_optimizer(stored: Any) -> Any:
    """Return the optimizer from its stored form."""
    if not isinstance(stored, dict):
        return stored
    if "kind" in stored:
        return ForKind(stored["kind"], _read_optimizer(stored["optimizer"]))
    return Sophia(**stored)


def read() -> dict[Run, Outcome]:
    """Return the outcomes of all stored runs."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    found = {}
    for line in map(json.loads, lines):
        run = dict(line["run"])
        run["optimizer"] = _read_optimizer(run["optimizer"])
        run["settings"] = Settings(**run["settings"])
        run["ends"] = tuple(map(tuple, run.get("ends", ())))
        found[Run(**run)] = Outcome(**line["outcome"])
    return found
