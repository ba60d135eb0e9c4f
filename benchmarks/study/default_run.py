"""Hyperparameter search for `python -m examples.gpt`, the default run of the trainer.

    python -m benchmarks.study.default_run

The search starts from the best hyperparameters for 400 steps with half the batch size: 12
trials near them, then five weight decays, then three other learning rates.
"""

import dataclasses

from benchmarks.study.optimizers import Optimizer, Sophia
from benchmarks.study.runs import Outcomes, train_all
from benchmarks.study.scale import with_rates
from benchmarks.study.search import best_of, refine, repeat, search
from benchmarks.study.tables import Runs, losses_table

TASK, STEPS = "code, batch 64", 800
DECAYS = (0.04, 0.1, 0.25, 0.6, 1.5)  # weight decay
RATES = (0.63, 1.0, 1.6, 2.5)  # learning rates, relative to the best so far
OPTIMIZERS: dict[str, Optimizer] = {
    "NAdamW": "nadamw",
    "AdamW": "adamw",
    "Sophia-G": Sophia(nesterov=True),
}


def best_runs(outcomes: Outcomes) -> Runs:
    """Return the best runs, keyed by optimizer and "loss"."""
    best = search([("code", optimizer) for optimizer in OPTIMIZERS.values()], outcomes)
    starts = {
        name: [dataclasses.replace(best["code", optimizer], task=TASK, steps=STEPS)]
        for name, optimizer in OPTIMIZERS.items()
    }
    decays = {
        name: [run, *(run.with_settings(weight_decay=decay) for decay in DECAYS)]
        for name, run in refine(starts, outcomes).items()
    }
    rates = {
        name: with_rates(run, RATES) for name, run in best_of(decays, outcomes).items()
    }
    return {(name, "loss"): repeat(run) for name, run in best_of(rates, outcomes).items()}


def table(outcomes: Outcomes) -> str:
    """Return the losses and hyperparameters, with the differences from NAdamW."""
    return losses_table("optimizer", best_runs(outcomes), outcomes, settings_of="loss")


if __name__ == "__main__":
    print(table(train_all))
