"""From AdamW and NAdamW to the paper's Sophia-G, one change at a time.

python -m benchmarks.study.path     # a few hours on two CPU cores
"""

import dataclasses
import itertools

from benchmarks.study.optimizers import Optimizer, Sophia
from benchmarks.study.runs import Outcomes, train_all
from benchmarks.study.search import repeat, search
from benchmarks.study.tables import Runs, losses_table

TASKS = ("code", "prose")
NOISE_BOUND = Sophia(
    "true labels", 1, 1.0, 1, divisor="√h", gamma="batch", bound="smooth", nesterov=True
)
CHANGES = {
    "a group for each sequence": {"groups": None},
    "a refresh every 10 steps": {"interval": 10},
    "on half of the batch": {"part": 0.5},
    "sampled labels": {"estimator": "sampled labels"},
    "gamma √h, target fraction": {"gamma": "fraction"},
    "gamma h": {"divisor": "h"},
    "clip instead of the smooth bound": {"bound": "clip"},
    "searched gamma": {"gamma": "number"},
    "no Nesterov momentum": {"nesterov": False},
    "1 group: the paper's Sophia-G": {"groups": 1},
}


def optimizers() -> dict[str, Optimizer]:
    """Return the optimizer after each change, keyed by the name of the change."""
    variant = NOISE_BOUND
    path: dict[str, Optimizer] = {"AdamW": "adamw", "NAdamW": "nadamw"}
    path["√(m² + h / B), true labels, 1 group"] = variant
    for change, values in CHANGES.items():
        variant = dataclasses.replace(variant, **values)
        path[change] = variant
    return path


def best_runs(outcomes: Outcomes) -> Runs:
    """Return the best runs with other seeds than the search, keyed by change and task."""
    path = optimizers()
    best = search(itertools.product(TASKS, path.values()), outcomes)
    return {
        (change, task): repeat(best[task, optimizer])
        for change, optimizer in path.items()
        for task in TASKS
    }


def table(outcomes: Outcomes) -> str:
    """Return the losses after each change, with the differences from the row above."""
    names = list(optimizers())
    row_above = dict(zip(names[1:], names, strict=False))
    return losses_table("change", best_runs(outcomes), outcomes, row_above, "code")


if __name__ == "__main__":
    print(table(train_all))
