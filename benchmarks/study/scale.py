"""Optimizers in longer runs, a larger model and larger batches: when does curvature pay?

    python -m benchmarks.study.scale    # about three hours on two CPU cores

The hyperparameters are the best for 400 steps of the task "code". Only the learning rate is
searched again for each scale.
"""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.study.optimizers import Optimizer, Sophia
from benchmarks.study.path import NOISE_BOUND
from benchmarks.study.runs import Outcomes, Run, train_all
from benchmarks.study.search import best_of, repeat, search
from benchmarks.study.tables import Runs, losses_table


class Scale(NamedTuple):
    task: str
    steps: int
    rates: tuple[float, ...]  # learning rates, relative to the best for 400 steps


SCALES = {
    "400 steps": Scale("code", 400, (1.0,)),
    "1,600 steps": Scale("code", 1600, (0.4, 0.63, 1.0, 1.6)),
    "6,400 steps": Scale("code", 6400, (0.4, 0.63, 1.0, 1.6)),
    "width 128": Scale("code, width 128", 400, (0.25, 0.4, 0.63)),
    "batch 128": Scale("code, batch 128", 400, (0.63, 1.0, 1.6)),
}
LENGTHS = "400 steps", "1,600 steps", "6,400 steps"

CLIP = Sophia(nesterov=True)
COMPARED: dict[str, Optimizer] = {
    "NAdamW": "nadamw",
    "AdamW": "adamw",
    "Sophia-G, smooth bound": dataclasses.replace(CLIP, gamma="fraction", bound="smooth"),
    "Sophia-G, clip": CLIP,
    "noise bound": dataclasses.replace(NOISE_BOUND, groups=None, part=0.5, interval=10),
}


def best_trials(
    outcomes: Outcomes, scales: Iterable[str] = SCALES, names: Iterable[str] = COMPARED
) -> dict[tuple[str, str], Run]:
    """Return the run with the best learning rate, keyed by optimizer and scale."""
    names = list(names)
    found = search([("code", COMPARED[name]) for name in names], outcomes)
    trials = {
        (name, scale): [
            dataclasses.replace(run, task=SCALES[scale].task, steps=SCALES[scale].steps)
            for run in with_rates(found["code", COMPARED[name]], SCALES[scale].rates)
        ]
        for scale in scales
        for name in names
    }
    return best_of(trials, outcomes)


def with_rates(run: Run, rates: Iterable[float]) -> list[Run]:
    """Return the run with its learning rate multiplied by each of these factors."""
    rate = run.settings.learning_rate
    return [run.with_settings(learning_rate=float(f"{r * rate:.3g}")) for r in rates]


def best_runs(outcomes: Outcomes, scales: Iterable[str] = SCALES) -> Runs:
    """Return the best runs, keyed by optimizer and scale."""
    return {key: repeat(run) for key, run in best_trials(outcomes, scales).items()}


def table(outcomes: Outcomes) -> str:
    """Return the losses at each scale, with the differences from NAdamW."""
    return losses_table("optimizer", best_runs(outcomes), outcomes)


if __name__ == "__main__":
    print(table(train_all))
