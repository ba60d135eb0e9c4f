"""Hyperparameter search with the same number of trials for each optimizer."""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import TypeVar

import numpy as np
from scipy.stats import qmc

from benchmarks.study.optimizers import Optimizer, Sophia
from benchmarks.study.runs import Outcomes, Run, Settings

NUM_WIDE, NUM_NEAR = 12, 6  # trials in the full ranges; in each of two rounds near the best
SEEDS = (1, 2, 3)  # of the runs that repeat the best trial; all trials have seed 0

Key = TypeVar("Key")
Pair = tuple[str, Optimizer]  # a task and an optimizer
Range = tuple[float, float]  # searched on a log scale
ONE_MINUS_B1, WEIGHT_DECAY = (0.05, 0.4), (0.05, 0.8)


def learning_rates(optimizer: Optimizer) -> Range:
    """Return the range of learning rates for an optimizer."""
    like_adam = not isinstance(optimizer, Sophia) or optimizer.gamma == "batch"
    lowest = 2.5e-3 if like_adam else 1.25e-3
    return lowest, 16 * lowest


def fourth_hyperparameter(optimizer: Optimizer) -> tuple[str, Range]:
    """Return the fourth hyperparameter's name and range. For b2, the range is of 1 - b2."""
    if not isinstance(optimizer, Sophia) or optimizer.gamma == "batch":
        return "b2", (0.003, 0.1)
    if optimizer.gamma == "fraction":
        return "fraction", (0.1, 0.95)
    return "gamma", (0.01, 0.3)


def wide_trials(task: str, optimizer: Optimizer) -> list[Run]:
    """Return trials at points of a Halton sequence in the full ranges."""
    name, fourth = fourth_hyperparameter(optimizer)
    ranges = np.log([learning_rates(optimizer), ONE_MINUS_B1, WEIGHT_DECAY, fourth])
    unit = qmc.Halton(4, rng=np.random.default_rng(0)).random(NUM_WIDE)
    points = np.exp(ranges[:, 0] + unit * np.diff(ranges)[:, 0])
    return [_trial(task, optimizer, name, *point) for point in points]


def near_trials(best: Run, seed: int) -> list[Run]:
    """Return trials near the best: each hyperparameter is within a factor of 1.5."""
    s, (name, _) = best.settings, fourth_hyperparameter(best.optimizer)
    fourth = 1 - s.b2 if name == "b2" else getattr(s, name)
    center = np.array([s.learning_rate, 1 - s.b1, s.weight_decay, fourth])
    unit = qmc.Halton(4, rng=np.random.default_rng(seed)).random(NUM_NEAR)
    points = center * 1.5 ** (2 * unit - 1)
    trials = [_trial(best.task, best.optimizer, name, *point) for point in points]
    return [dataclasses.replace(trial, steps=best.steps) for trial in trials]


def _trial(
    task: str, optimizer: Optimizer, name: str,
    rate: float, one_minus_b1: float, decay: float, fourth: float,
) -> Run:  # fmt: skip
    if name == "fraction":
        fourth = min(fourth, 0.98)
    values = {"learning_rate": rate, "weight_decay": decay, name: fourth}
    rounded = {key: float(f"{value:.3g}") for key, value in values.items()}
    rounded["b1"] = 1 - float(f"{one_minus_b1:.3g}")
    if name == "b2":
        rounded["b2"] = 1 - rounded["b2"]
    return Run(task, optimizer, Settings(**{k: round(v, 9) for k, v in rounded.items()}))


def search(pairs: Iterable[Pair], outcomes: Outcomes) -> dict[Pair, Run]:
    """Return the best trial for each pair of a task and an optimizer."""
    return refine({pair: wide_trials(*pair) for pair in pairs}, outcomes)


def refine(trials: dict[Key, list[Run]], outcomes: Outcomes) -> dict[Key, Run]:
    """Return the best trials after two more rounds of trials near the best."""
    for seed in (1, 2):
        best = best_of(trials, outcomes)
        trials = {key: trials[key] + near_trials(best[key], seed) for key in trials}
    return best_of(trials, outcomes)


def best_of(trials: dict[Key, list[Run]], outcomes: Outcomes) -> dict[Key, Run]:
    """Return the run with the lowest loss of each list."""
    known = outcomes(itertools.chain.from_iterable(trials.values()))
    return {
        key: min(found, key=lambda run: known[run].loss) for key, found in trials.items()
    }


def repeat(run: Run) -> list[Run]:
    """Return the run with each of the seeds `SEEDS`."""
    return [dataclasses.replace(run, seed=seed) for seed in SEEDS]
